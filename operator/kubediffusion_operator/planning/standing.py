# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How a model stands: how many replicas it has and should have, and why it does not serve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kubediffusion_operator.planning.cache import PlanCache
from kubediffusion_operator.planning.failures import Failure, of_deployment, worst
from kubediffusion_operator.planning.models import (
    Replicas,
    identity_of,
    node_spec,
    pool_of,
    replicas_of,
)
from kubediffusion_operator.planning.names import (
    controller_of,
    model_labels,
    name_of,
    pool_labels,
    selector_text,
    status_of,
    uid_of,
)
from kubediffusion_operator.planning.pools import PoolPlan
from kubediffusion_operator.planning.residency import (
    is_running,
    loras_in,
    report_of,
    takes_requests,
)
from kubediffusion_operator.planning.types import LoraKey, Object, Observed, ResidencyReport

READY = "Ready"
SCALED_TO_ZERO = "ScaledToZero"


@dataclass(slots=True)
class Standing:
    """One model as it is. `reason` is Ready or why not; `failure` what goes wrong, if anything."""

    model: Object
    replicas: Replicas
    identity: str
    present: int = 0
    ready: int = 0
    reason: str = "Starting"
    message: str = "its node starts and loads it"
    failure: Failure | None = None
    selector: str = ""
    nbytes: int = 0
    digest: str = ""
    # Running pods that host it, each with what it said.
    nodes: tuple[tuple[Object, ResidencyReport | None], ...] = ()
    # Without nodes of its own (`planning.hosting`); then how it stands on each host's, by name.
    helper: bool = False
    at: dict[str, Standing] = field(default_factory=dict[str, "Standing"])

    @property
    def name(self) -> str:
        return name_of(self.model)

    @property
    def is_ready(self) -> bool:
        """Requests can use it, or can bring it back."""
        return self.reason in (READY, SCALED_TO_ZERO)

    def knows(self, loras: Iterable[LoraKey]) -> bool:
        """Whether requests can name them: it declares them, and every node that serves it was
        told so, and answered."""
        wanted = frozenset(loras)
        if not wanted <= loras_in(node_spec(self.model)):
            return False
        return all(
            report is not None
            and not report.error
            and any(wanted <= s.loras for s in report.models if s.identity == self.name)
            for pod, report in self.nodes
            if takes_requests(pod)
        )

    @property
    def named_right(self) -> bool:
        """A model is found by its identity; under another name nobody finds it."""
        return self.name == self.identity

    def settle(self) -> Standing:
        """Says READY where a replica serves or none is wanted, else what failed, if it did."""
        if self.ready:
            self.reason, self.message = READY, "requests can use it"
        elif not self.replicas.wanted and self.failure is None:
            self.reason = SCALED_TO_ZERO
            self.message = "it has no replica now; the next request for it brings one"
        elif self.failure is not None:
            self.reason, self.message = self.failure.reason, self.failure.message
        return self


def child(owner: Object, name: str, objects: Mapping[str, Object]) -> Object | None:
    """The owner's child of that name, where it is this very owner's."""
    found = objects.get(name)
    return found if found is not None and controller_of(found) == uid_of(owner) else None


def standing(
    model: Object,
    observed: Observed,
    pods: Sequence[Object],
    pools: Mapping[str, PoolPlan],
    cache: PlanCache,
) -> Standing:
    """`pods` are the model's own; in a pool its nodes are the pool's."""
    found = Standing(model, replicas_of(model), identity_of(model, cache))
    pool = pool_of(model)
    labels = pool_labels(pool) if pool else model_labels(found.name)
    found.selector = selector_text(labels)
    if not found.named_right:
        return misnamed(found)
    if pool:
        _in_pool(found, pool, pools.get(pool))
    else:
        _alone(found, observed, pods)
    return found


def misnamed(found: Standing) -> Standing:
    found.reason = "NameIsNotIdentity"
    found.message = (
        f"nobody finds a model by this name: what it computes is called {found.identity}; "
        "make it again with that as metadata.name"
    )
    found.failure = Failure(found.reason, found.message)
    return found


def _alone(found: Standing, observed: Observed, pods: Sequence[Object]) -> None:
    deployment = child(found.model, found.name, observed.deployments)
    found.nodes = _nodes(pods, observed.residency)
    reports = [r for pod in pods if (r := report_of(pod, observed.residency)) is not None]
    learn(found, reports)
    found.failure = refused(observed, found.name) or worst(pods)
    if deployment is not None:
        status = status_of(deployment)
        found.present = int(status.get("replicas") or 0)
        found.ready = int(status.get("readyReplicas") or 0)
        found.failure = found.failure or of_deployment(deployment)
    found.settle()


def _in_pool(found: Standing, pool: str, plan: PoolPlan | None) -> None:
    if plan is None:
        found.reason = "PoolNotFound"
        found.message = f"there is no ModelPool {pool}; make it, or change placement"
        found.failure = Failure(found.reason, found.message)
        return
    learn(found, plan.reports.values())
    hosts = [plan.nodes[node] for node in plan.plan.get(found.name, ())]
    found.nodes = tuple((pod, plan.reports.get(name_of(pod))) for pod in hosts if is_running(pod))
    said = plan.said_of(found.name)
    found.present = len(plan.plan.get(found.name, ()))
    found.ready = sum(1 for each in said if each.state == "READY")
    found.failure = plan.failure_of(found.name)
    if found.name in plan.placed.left:
        found.failure = _does_not_fit(found, plan)
    found.settle()


def _nodes(
    pods: Iterable[Object], residency: Mapping[str, ResidencyReport]
) -> tuple[tuple[Object, ResidencyReport | None], ...]:
    return tuple((pod, report_of(pod, residency)) for pod in pods if is_running(pod))


def _does_not_fit(found: Standing, plan: PoolPlan) -> Failure:
    pool = name_of(plan.pool)
    if not plan.nodes:
        text = f"ModelPool {pool} has no node that runs; see its conditions, or raise its replicas"
        return Failure("NoNodes", text)
    size = f"{found.nbytes / 2**30:.1f} GiB" if found.nbytes else "room"
    limit = f" of {plan.memory_limit / 2**30:.1f} GiB each" if plan.memory_limit else ""
    return Failure(
        "DoesNotFit",
        f"it takes {size} and no node of ModelPool {pool} ({len(plan.nodes)}{limit}) has that "
        "left; raise the pool's replicas or memoryLimit, or place the model elsewhere",
    )


def learn(found: Standing, reports: Iterable[ResidencyReport]) -> None:
    """Size and digest of the weights, as the nodes found out; what was known stays."""
    status = status_of(found.model)
    found.nbytes = int(status.get("nbytes") or 0)
    found.digest = str(status.get("digest") or "")
    for report in reports:
        for said in report.models:
            if said.identity == found.name:
                found.nbytes = said.nbytes or found.nbytes
                found.digest = said.digest or found.digest


def refused(observed: Observed, name: str) -> Failure | None:
    """What the API server does not take of a model's or pool's children."""
    for kind in ("Deployment", "Service", "ConfigMap", "NetworkPolicy", "PodDisruptionBudget"):
        message = observed.refused.get((kind, name))
        if message is not None:
            text = f"the API server refuses its {kind}: {message}; change podTemplate or resources"
            return Failure("Refused", text)
    return None


def last_failure(about: Object, failure: Failure | None, now: str) -> dict[str, Any] | None:
    """As it is written: the last one stays when it is over, with its own time."""
    known: dict[str, Any] | None = status_of(about).get("lastFailure")
    if failure is None:
        return known
    same = known is not None and known.get("reason") == failure.reason
    if not failure.time and same and known is not None and known.get("message") == failure.message:
        return known
    return failure.as_status(now)
