# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What the statuses of a DiffusionModel and a ModelPool say, and their events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kubediffusion_operator.planning.conditions import Condition, written
from kubediffusion_operator.planning.failures import Failure, of_deployment, worst
from kubediffusion_operator.planning.names import (
    generation_of,
    name_of,
    pool_child,
    pool_labels,
    ref_of,
    selector_text,
    status_of,
)
from kubediffusion_operator.planning.pools import PoolPlan, is_settled
from kubediffusion_operator.planning.standing import Standing, child, last_failure, refused
from kubediffusion_operator.planning.types import EventRecord, Object, Observed

MAX_USERS = 256
MAX_HOSTS = 256
_AS_EXPECTED = Condition("Degraded", "False", "AsExpected")


def model_status(
    found: Standing, users: Sequence[Mapping[str, str]], twin: str, now: str
) -> tuple[Object, list[EventRecord]]:
    """`users` are the workflows that use it; `twin` a model with the same weights, or ""."""
    model = found.model
    ready: Condition
    if found.is_ready:
        ready = Condition("Ready", "True", found.reason, found.message, "Normal")
    else:
        ready = Condition("Ready", "False", found.reason, found.message)
    wanted = [ready, _degraded(found.failure)]
    if twin:
        text = (
            f"its weights are those of {twin} under another source: "
            "name one source in both workflows, and they share one model"
        )
        wanted.append(Condition("EqualWeights", "True", "SharedByName", text, "Warning"))
    wanted += _hosted(found)
    conditions, events = written(model, wanted, now)
    status: Object = {
        "observedGeneration": generation_of(model),
        "identity": found.identity,
        "replicas": found.present,
        "readyReplicas": found.ready,
        "desiredReplicas": found.replicas.wanted,
        "selector": found.selector,
        "reason": found.reason,
        "referencedBy": [dict(user) for user in users[:MAX_USERS]],
        "conditions": conditions,
    }
    extra = {
        "digest": found.digest,
        "nbytes": found.nbytes,
        "hostedBy": list(found.at)[:MAX_HOSTS],
        "lastFailure": last_failure(model, found.failure, now),
    }
    clamped = _clamped(found)
    return status | {k: v for k, v in extra.items() if v}, events + clamped


def _hosted(found: Standing) -> list[Condition]:
    """Of a model without nodes of its own: whose they are, and what its spec says of nodes for
    nothing."""
    if not found.at:
        return []
    spec = found.model["spec"]
    idle = [f"spec.{name}" for name in _OF_NODES if spec.get(name) is not None]
    asked = found.replicas.asked
    if asked is not None and asked != found.replicas.wanted:
        idle.append("spec.replicas")
    text = f"it runs on the nodes of {', '.join(found.at)}, and has as many as there are of these"
    if not idle:
        return [Condition("CoHosted", "True", "OnHostsNodes", text)]
    text += f"; {' and '.join(idle)} change nothing: scale and place what it runs beside"
    return [Condition("CoHosted", "True", "FieldsIgnored", text, "Warning")]


# Fields of a ModelSpec that say something of nodes.
_OF_NODES = ("scaling", "placement", "podTemplate")


def _clamped(found: Standing) -> list[EventRecord]:
    """Told once for each change of the spec, to whoever set spec.replicas."""
    if not found.replicas.bound:
        return []
    if int(status_of(found.model).get("observedGeneration") or 0) >= generation_of(found.model):
        return []
    text = (
        f"spec.replicas {found.replicas.asked} is outside {found.replicas.bound}: "
        f"{found.replicas.wanted} it is; change that bound, or set scaling.mode to external"
    )
    return [EventRecord(ref_of(found.model), "Warning", "ReplicasClamped", text)]


def twins(standings: Mapping[str, Standing]) -> dict[str, str]:
    """Models with equal weights and arithmetic but other sources: the later to the earlier name."""
    first: dict[tuple[object, ...], str] = {}
    found: dict[str, str] = {}
    for name in sorted(standings):
        each = standings[name]
        if not each.digest:
            continue
        spec: dict[str, Any] = each.model["spec"]
        kept = ("loras", "replicas", "resources", "scaling", "placement", "podTemplate", "source")
        told = sorted((k, str(v)) for k, v in spec.items() if k not in (*kept, "drainSeconds"))
        earlier = first.setdefault((each.digest, *told), name)
        if earlier != name:
            found[name] = earlier
    return found


def pool_status(
    plan: PoolPlan, bad: Failure | None, observed: Observed
) -> tuple[Object, list[EventRecord]]:
    """`bad`: why its pods cannot be made as it says."""
    pool, now = plan.pool, observed.now
    name = name_of(pool)
    deployment = child(pool, pool_child(name), observed.deployments)
    given = status_of(deployment or {})
    desired = int(pool["spec"].get("replicas", 1))
    ready = int(given.get("readyReplicas") or 0)
    failure = bad or refused(observed, pool_child(name)) or worst(plan.pods)
    if deployment is not None:
        failure = failure or of_deployment(deployment)
    wanted = [_pool_ready(desired, ready, failure), _applied(plan), _degraded(failure)]
    conditions, events = written(pool, wanted, now)
    status: Object = {
        "observedGeneration": generation_of(pool),
        "replicas": int(given.get("replicas") or 0),
        "readyReplicas": ready,
        "desiredReplicas": desired,
        "selector": selector_text(pool_labels(name)),
        "reason": wanted[0].reason,
        "planGeneration": plan.generation,
        "planHash": plan.hash,
        "planTime": plan.time,
        "plan": [{"model": model, "nodes": list(nodes)} for model, nodes in plan.plan.items()],
        "conditions": conditions,
    }
    last = last_failure(pool, failure, now)
    return status | ({"lastFailure": last} if last else {}), events


def _pool_ready(desired: int, ready: int, failure: Failure | None) -> Condition:
    if ready >= desired:
        text = "all its nodes run" if desired else "it is to have no node"
        return Condition("Ready", "True", "Ready", text, "Normal")
    if failure is not None:
        return Condition("Ready", "False", failure.reason, failure.message)
    return Condition("Ready", "False", "Starting", "its nodes are starting")


def _applied(plan: PoolPlan) -> Condition:
    crowded = {helper for several in plan.placed.without.values() for helper in several}
    if crowded or plan.placed.left:
        names = ", ".join(sorted({*crowded, *plan.placed.left}))
        text = f"no node has room for {names}; raise replicas or memoryLimit"
        return Condition("PlanApplied", "False", "DoesNotFit", text, "Warning")
    failed = sorted(model for model in plan.models if plan.failure_of(model) is not None)
    if failed:
        text = f"nodes could not load {', '.join(failed)}; see those DiffusionModels"
        return Condition("PlanApplied", "False", "LoadFailed", text, "Warning")
    if not is_settled(plan):
        return Condition("PlanApplied", "False", "Loading", "nodes are loading what is planned")
    return Condition("PlanApplied", "True", "Applied", "nodes host what is planned")


def _degraded(failure: Failure | None) -> Condition:
    if failure is None:
        return _AS_EXPECTED
    return Condition("Degraded", "True", failure.reason, failure.message, "Warning")
