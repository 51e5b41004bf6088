# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A namespace's objects and Prometheus' numbers as what `scaling` decides on. Pure."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from kubediffusion.api.serving import Scaling, quantity
from kubediffusion.scaling import (
    Budget,
    Demand,
    Limits,
    Metrics,
    MetricState,
    Observation,
    WorkflowCase,
    limits_of,
)
from kubediffusion_operator.autoscaler.prometheus import PrometheusUnavailable
from kubediffusion_operator.autoscaler.reading import Reading, demand_of
from kubediffusion_operator.config import OperatorConfig
from kubediffusion_operator.planning.failures import is_ready, of_deployment, of_pod
from kubediffusion_operator.planning.hosting import helps
from kubediffusion_operator.planning.models import replicas_of
from kubediffusion_operator.planning.names import (
    MODEL,
    POOL,
    is_going,
    labels_of,
    name_of,
    owners_of,
    pool_child,
    status_of,
)
from kubediffusion_operator.planning.types import Object, Objects


@dataclass(frozen=True)
class NamespaceObjects:
    """The objects of one namespace, by name."""

    namespace: str
    models: Objects
    deployments: Objects = field(default_factory=dict[str, Object])
    pods: Objects = field(default_factory=dict[str, Object])
    pools: Objects = field(default_factory=dict[str, Object])
    quotas: Sequence[Object] = ()


@dataclass(frozen=True, slots=True)
class Scaled:
    """A model that is ours to scale."""

    object: Object
    observation: Observation
    limits: Limits
    gpus: int
    live: int
    ending: int


@dataclass(frozen=True, slots=True)
class Left:
    """A model that is not: for `reason`, told with `why`, or because nobody asked for it."""

    object: Object
    reason: str = ""
    why: str = ""


@dataclass(frozen=True)
class View:
    scaled: Mapping[str, Scaled]
    left: Mapping[str, Left]
    workflows: Mapping[str, WorkflowCase]
    budget: Budget


@dataclass(frozen=True, slots=True)
class _Pods:
    """Of one model or pool: `live` includes all that are not `ending`, ready or not; `gpus` are
    what they hold together."""

    ready: int = 0
    live: int = 0
    ending: int = 0
    gpus: int = 0
    failures: tuple[str, ...] = ()


def observe(
    found: NamespaceObjects, reading: Reading | PrometheusUnavailable, config: OperatorConfig
) -> View:
    pods = _pods_by_owner(found.pods.values(), config.scaling.gpu_resource)
    scaled: dict[str, Scaled] = {}
    left: dict[str, Left] = {}
    for name, model in found.models.items():
        if is_going(model):
            continue
        limits = _limits(model, config)
        if isinstance(limits, Left):
            left[name] = limits
        else:
            scaled[name] = _scaled(model, limits, found, pods, reading, config)
    reserved = _reserved(found, left, pods, config)
    return View(
        scaled,
        left,
        _workflows(found, reading),
        _budget(found.quotas, config, reserved),
    )


# ---------------------------------------------------------------- models


def _limits(model: Object, config: OperatorConfig) -> Limits | Left:
    scaling: Mapping[str, Any] | None = model["spec"].get("scaling")
    if helps(model):
        why = "it runs on the nodes of the models in status.hostedBy, and scales with them"
        return Left(model, "CoHosted" if scaling is not None else "", why)
    if scaling is None:  # as kubectl scale sets them; there is nothing to say about it
        return Left(model)
    if scaling.get("mode") == "external":
        why = "scaling.mode is external: HPA, KEDA or kubectl scale sets the replicas"
        return Left(model, "External", why)
    if not config.scaling.enabled:
        return Left(model, "Disabled", "the operator is configured with scaling.enabled: false")
    try:
        return limits_of(Scaling.model_validate_json(json.dumps(scaling)))
    except ValidationError as error:  # of a CRD that is newer than this operator
        first = error.errors()[0]
        field_name = ".".join(map(str, first["loc"]))
        why = f"scaling.{field_name} is not understood: {first['msg']}; upgrade the operator"
        return Left(model, "NotUnderstood", why)


def _scaled(
    model: Object,
    limits: Limits,
    found: NamespaceObjects,
    pods: Mapping[tuple[str, str], _Pods],
    reading: Reading | PrometheusUnavailable,
    config: OperatorConfig,
) -> Scaled:
    name = name_of(model)
    if isinstance(reading, PrometheusUnavailable):
        demand, metrics = Demand(), _no_answer(reading)
    else:
        stale = config.prometheus.stale_seconds
        demand, metrics = demand_of(reading, found.namespace, name, stale)
    asked = replicas_of(model).asked
    current = limits.minimum if asked is None else asked
    if model["spec"].get("placement"):
        # On the nodes of a pool, whose GPUs are counted with the pool.
        ready = min(current, int(status_of(model).get("readyReplicas") or 0))
        observation = Observation(current, demand, metrics, ready=ready, starting=current - ready)
        return Scaled(model, observation, limits, gpus=0, live=0, ending=0)
    deployment = found.deployments.get(name)
    mine = pods.get((MODEL, name), _Pods())
    stuck, why = _stuck(mine, deployment, current)
    ready = min(mine.ready, current - stuck)
    observation = Observation(
        current,
        demand,
        metrics,
        ready=ready,
        starting=current - stuck - ready,
        stuck=stuck,
        stuck_reason=why,
    )
    return Scaled(
        model, observation, limits, _gpus(deployment, model, config), mine.live, mine.ending
    )


def _no_answer(problem: PrometheusUnavailable) -> Metrics:
    return Metrics(MetricState.UNKNOWN, problem.reason, problem.message)


def _stuck(pods: _Pods, deployment: Object | None, current: int) -> tuple[int, str]:
    """How many of `current` replicas cannot start, and the word for why."""
    failures = list(pods.failures)
    failure = None if deployment is None else of_deployment(deployment)
    if failure is not None and failure.reason != "NotReady":  # its pods cannot even be made
        failures += [failure.reason] * max(0, current - pods.live)
    elif failure is not None and not failures:
        failures += [failure.reason] * max(0, current - pods.ready)
    counted = sorted(failures, key=lambda reason: (-failures.count(reason), reason))
    return min(len(failures), current), counted[0] if counted else ""


def _pods_by_owner(pods: Iterable[Object], gpu: str) -> dict[tuple[str, str], _Pods]:
    """By (label, its value): of a model, or of a pool."""
    groups: dict[tuple[str, str], list[Object]] = defaultdict(list)
    for pod in pods:
        labels = labels_of(pod)
        for label in (MODEL, POOL):
            if label in labels:
                groups[label, labels[label]].append(pod)
    return {owner: _counted(group, gpu) for owner, group in groups.items()}


def _counted(pods: Sequence[Object], gpu: str) -> _Pods:
    # One that was evicted, say, holds nothing any more; its Deployment has made another.
    there = [pod for pod in pods if status_of(pod).get("phase") not in ("Failed", "Succeeded")]
    live = [pod for pod in there if not is_going(pod)]
    failures = [failure.reason for pod in live if (failure := of_pod(pod)) is not None]
    return _Pods(
        ready=sum(is_ready(pod) for pod in live),
        live=len(live),
        ending=len(there) - len(live),
        gpus=sum(_gpus_in(pod["spec"], gpu) for pod in there),
        failures=tuple(failures),
    )


# ---------------------------------------------------------------- workflows


def _workflows(
    found: NamespaceObjects, reading: Reading | PrometheusUnavailable
) -> dict[str, WorkflowCase]:
    models: dict[str, set[str]] = defaultdict(set)
    for name, model in found.models.items():
        for user in _users(model):
            models[user].add(name)
    held = {} if isinstance(reading, PrometheusUnavailable) else reading.held
    return {
        name: WorkflowCase(frozenset(used), held.get((found.namespace, name)))
        for name, used in models.items()
    }


def _users(model: Object) -> set[str]:
    """Workflows that use it: its owners from the first moment on, and what the status says, which
    comes later and for a model that was made by hand too."""
    owners = {str(o["name"]) for o in owners_of(model) if o.get("kind") == "DiffusionWorkflow"}
    return owners | {str(user["name"]) for user in status_of(model).get("referencedBy") or ()}


# ---------------------------------------------------------------- GPUs


def _gpus(deployment: Object | None, owner: Object, config: OperatorConfig) -> int:
    """Of one replica: as its pods ask for them, or as they will once there is a Deployment."""
    resource = config.scaling.gpu_resource
    if deployment is not None:
        return _gpus_in(deployment["spec"]["template"]["spec"], resource)
    given: Mapping[str, Any] = owner["spec"].get("resources") or {}
    limits: Mapping[str, str] = given.get("limits") or {}
    if any("/" in name for name in limits) or given.get("claims"):
        return _count(given, resource)
    return 1 if config.device.startswith("cuda") else 0


def _gpus_in(spec: Mapping[str, Any], resource: str) -> int:
    """Of a pod with this spec."""
    containers: Sequence[Mapping[str, Any]] = spec.get("containers") or ()
    return sum(_count(each.get("resources") or {}, resource) for each in containers)


def _count(resources: Mapping[str, Any], resource: str) -> int:
    for part in ("limits", "requests"):
        if resource in (resources.get(part) or {}):
            return int(quantity(str(resources[part][resource])))
    return 0


def _reserved(
    found: NamespaceObjects,
    left: Mapping[str, Left],
    pods: Mapping[tuple[str, str], _Pods],
    config: OperatorConfig,
) -> int:
    """GPUs of what others scale: models that are left to them, and pools."""
    total = 0
    known: set[tuple[str, str]] = set()
    for name, model in found.models.items():
        if helps(model):  # it is on GPUs that are counted with its hosts
            continue
        known.add((MODEL, name))
        if (name in left or is_going(model)) and not model["spec"].get("placement"):
            asked = 0 if is_going(model) else replicas_of(model).wanted
            gpus = _gpus(found.deployments.get(name), model, config)
            total += _held(pods.get((MODEL, name), _Pods()), asked, gpus)
    for name, pool in found.pools.items():
        known.add((POOL, name))
        asked = 0 if is_going(pool) else int(pool["spec"].get("replicas", 1))
        gpus = _gpus(found.deployments.get(pool_child(name)), pool, config)
        total += _held(pods.get((POOL, name), _Pods()), asked, gpus)
    # Pods of models and pools that are gone drain like any other.
    return total + sum(group.gpus for owner, group in pods.items() if owner not in known)


def _held(pods: _Pods, asked: int, gpus: int) -> int:
    return (max(asked, pods.live) + pods.ending) * gpus


def _budget(quotas: Sequence[Object], config: OperatorConfig, reserved: int) -> Budget:
    """The tightest ResourceQuota counts. One with scopes is for some pods only, and left out."""
    limit, name = config.scaling.gpu_budget, f"requests.{config.scaling.gpu_resource}"
    found: list[tuple[int, int]] = []
    for quota in quotas:
        spec = quota.get("spec") or {}
        hard: Mapping[str, Any] = spec.get("hard") or {}
        if name in hard and not spec.get("scopes") and not spec.get("scopeSelector"):
            used: Mapping[str, Any] = status_of(quota).get("used") or {}
            found.append((int(quantity(str(hard[name]))), int(quantity(str(used.get(name, 0))))))
    if not found:
        return Budget(limit=limit, reserved=reserved)
    bound, used_now = min(found, key=lambda each: (each[0] - each[1], each[0]))
    return Budget(limit=limit, quota=bound, quota_used=used_now, reserved=reserved)
