# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A ModelPool: its nodes, what each hosts, and how far they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kubediffusion.api.serving import quantity
from kubediffusion_operator.planning.diff import digest
from kubediffusion_operator.planning.failures import Failure, of_report
from kubediffusion_operator.planning.models import node_spec, replicas_of
from kubediffusion_operator.planning.names import PLANNER, items, name_of, status_of
from kubediffusion_operator.planning.placement import Item, Placed, place
from kubediffusion_operator.planning.residency import (
    RETRY_SECONDS,
    is_done,
    is_running,
    is_usable,
    report_of,
    seconds_between,
)
from kubediffusion_operator.planning.types import ModelReport, Object, ResidencyReport


@dataclass
class PoolPlan:
    """`nodes` are the pods that models can be on; `models` all that are placed in the pool, and
    the helpers that come along."""

    pool: Object
    pods: Sequence[Object]
    nodes: Mapping[str, Object]
    models: Mapping[str, Object]
    placed: Placed
    # The nodes of each model that has some, of the helpers too.
    plan: Mapping[str, Sequence[str]]
    generation: int = 0
    hash: str = ""
    # Since when it is the plan.
    time: str = ""
    # Seconds until what failed is tried again.
    retry_in: float | None = None
    # By pod: what it said, where that is about its present life.
    reports: Mapping[str, ResidencyReport] = field(default_factory=dict[str, ResidencyReport])

    @property
    def memory_limit(self) -> int:
        return memory_limit(self.pool)

    @property
    def failed(self) -> bool:
        return any(said.state == "FAILED" for name in self.models for said in self.said_of(name))

    def has_no_room(self, helper: str, host: str) -> bool:
        return helper in self.placed.without.get(host, ())

    def hosts(self, pod: str) -> list[str]:
        return [model for model, nodes in self.plan.items() if pod in nodes]

    def content(self, pod: str) -> dict[str, Any]:
        """What the pod is told: a SetResidencyRequest in protobuf's JSON."""
        specs = [node_spec(self.models[model]) for model in self.hosts(pod)]
        return {"generation": str(self.generation), "planner": PLANNER, "models": specs}

    def said_of(self, model: str, host: str = "") -> list[ModelReport]:
        """What the nodes that the model is planned on say of it; only those of `host`, if named."""
        return [
            said
            for pod in self.plan.get(model, ())
            if not host or pod in self.placed.plan.get(host, ())
            if (report := self.reports.get(pod)) is not None
            for said in report.models
            if said.identity == model
        ]

    def failure_of(self, model: str) -> Failure | None:
        return next((f for said in self.said_of(model) if (f := of_report(said))), None)


def memory_limit(pool: Object) -> int:
    """Bytes that models may take on each node; 0 where no limit is known."""
    text = str(pool["spec"].get("memoryLimit") or "")
    return int(quantity(text)) if text else 0


def planned(
    pool: Object,
    models: Iterable[Object],
    pods: Sequence[Object],
    residency: Mapping[str, ResidencyReport],
    now: str,
    helpers: Mapping[str, Sequence[Object]] | None = None,
) -> PoolPlan:
    """The plan of one pool. `models` are those placed in it, `pods` those with its label, and
    `helpers` the models that have to be where a model is, by its name."""
    known = {name_of(model): model for model in models}
    helping = {name: (helpers or {}).get(name, ()) for name in known}
    named = {name: [name_of(each) for each in helping[name]] for name in known}
    before = _plan_in(pool)
    hosting = {node for nodes in before.values() for node in nodes}
    nodes = {name_of(p): p for p in pods if is_usable(p, hosting=name_of(p) in hosting)}
    reports = {
        name: report
        for name, pod in nodes.items()
        if (report := report_of(pod, residency)) is not None
    }
    items = [
        Item(
            name,
            min(replicas_of(model).wanted, max(1, len(nodes))),
            _size(model, reports),
            {name_of(each): _size(each, reports) for each in helping[name]},
        )
        for name, model in known.items()
    ]
    limits = {
        name: (reports[name].memory_limit if name in reports else 0) or memory_limit(pool)
        for name in nodes
    }
    known = known | {name_of(each): each for several in helping.values() for each in several}
    placed = place(items, limits, before)
    plan = _with_helpers(placed, named)
    result = PoolPlan(pool, pods, nodes, known, placed, plan, reports=reports)
    _count(result, now)
    return result


def _with_helpers(
    placed: Placed, helpers: Mapping[str, Sequence[str]]
) -> Mapping[str, Sequence[str]]:
    found = {model: set(nodes) for model, nodes in placed.plan.items()}
    for host, nodes in placed.plan.items():
        for helper in helpers[host]:
            if helper not in placed.without.get(host, ()):
                found.setdefault(helper, set()).update(nodes)
    return {model: sorted(found[model]) for model in sorted(found)}


def _count(plan: PoolPlan, now: str) -> None:
    """Another generation for another plan, and one above whatever a node has seen already."""
    told: dict[str, Any] = {pod: plan.content(pod)["models"] for pod in sorted(plan.nodes)}
    plan.hash = digest(told)
    status = status_of(plan.pool)
    known, since = int(status.get("planGeneration") or 0), str(status.get("planTime") or "")
    seen = max((report.generation for report in plan.reports.values()), default=0)
    again = plan.failed and seconds_between(since, now) >= RETRY_SECONDS
    if known and seen <= known and status.get("planHash") == plan.hash and not again:
        plan.generation, plan.time = known, since
    else:
        plan.generation, plan.time = max(known, seen) + 1, now
    plan.retry_in = RETRY_SECONDS - seconds_between(plan.time, now) if plan.failed else None


def _plan_in(pool: Object) -> dict[str, tuple[str, ...]]:
    entries = items(status_of(pool), "plan")
    return {str(entry["model"]): tuple(entry.get("nodes") or ()) for entry in entries}


def _size(model: Object, reports: Mapping[str, ResidencyReport]) -> int:
    """What it takes, as some node found out; 0 where none has."""
    said = [
        each.nbytes
        for report in reports.values()
        for each in report.models
        if each.identity == name_of(model)
    ]
    return max(said, default=0) or int(status_of(model).get("nbytes") or 0)


def is_settled(plan: PoolPlan) -> bool:
    """Every node that can hear has carried out what it was told."""
    return all(
        is_done(plan.content(name), plan.reports.get(name))
        for name, pod in plan.nodes.items()
        if is_running(pod)
    )
