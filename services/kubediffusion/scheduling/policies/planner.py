# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Residency that follows demand: a new plan when it is clearly better, carried out node by node.

Demand is what arrived lately, with older arrivals forgotten exponentially. A plan changes only when
the new one is better by `Limits.gain`, and only `Limits.at_once` of the nodes load at a time, so
that following the demand never costs more than a small part of the fleet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.pipelines import Job, Pipeline
from kubediffusion.scheduling.policy import Load, Node
from kubediffusion.scheduling.residency import Plan, Room, Unit, plan_units, units_of


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds between looks and of memory; the gain that a change must bring; the share of the
    nodes that may load at once; bytes of each node kept free for activations."""

    every: float = 5.0
    memory: float = 20.0
    # What was planned for counts as so many requests seen.
    prior: float = 10.0
    gain: float = 0.2
    # Nothing is planned anew before so much of the mix (summed changes of shares) has moved.
    moved: float = 0.25
    at_once: float = 0.13
    spare_bytes: float = 0.0


class Planner:
    def __init__(
        self,
        nodes: Sequence[Node],
        costs: Costs,
        pipelines: Sequence[Pipeline],
        mix: Mapping[str, float],
        limits: Limits,
    ) -> None:
        self.limits = limits
        self._nodes = nodes
        self._costs = costs
        self._pipelines = pipelines
        total = sum(mix.values()) or 1.0
        self._seen = {name: limits.prior * share / total for name, share in mix.items()}
        self._planned = {name: share / total for name, share in mix.items()}
        self._nodes_then: tuple[bool | frozenset[str], ...] = tuple(
            node.up and frozenset(node.resident) for node in nodes
        )
        self._last = 0.0
        self._looked = 0.0
        self.targets: dict[int, frozenset[str]] = {}

    def arrived(self, job: Job, now: float) -> None:
        self._forget(now)
        name = job.pipeline.name
        self._seen[name] = self._seen.get(name, 0.0) + 1.0

    def _forget(self, now: float) -> None:
        keep = math.exp((self._last - now) / self.limits.memory)
        self._last = now
        for name in self._seen:
            self._seen[name] *= keep

    def due(self, now: float) -> bool:
        return now >= self._looked + self.limits.every

    def look(self, now: float) -> None:
        """Plan anew where that is worth it."""
        self._looked = now
        total = sum(self._seen.values())
        shares = {name: value / total for name, value in self._seen.items()} if total else {}
        if total < self.limits.prior / 2 or not self._changed(shares):
            return
        self._planned = shares
        up = [node for node in self._nodes if node.up]
        units = units_of(self._pipelines, self._costs, self._seen, len(up))
        rooms = [Room(node.index, node.memory - self.limits.spare_bytes) for node in up]
        current: Plan = {node.index: _held(node, units) for node in up}
        plan = plan_units(units, rooms, current, keep=0.1)
        before, after = _score(current, units), _score(plan, units)
        if after < (1.0 - self.limits.gain) * before:
            self.targets = {
                index: frozenset(m for unit in units if unit.name in chosen for m in unit.models)
                for index, chosen in plan.items()
                if chosen != current[index]
            }

    def _changed(self, shares: Mapping[str, float]) -> bool:
        """Whether the mix, or the nodes, are others than at the last plan."""
        nodes = tuple(node.up and frozenset(node.resident) for node in self._nodes)
        if nodes != self._nodes_then:
            self._nodes_then = nodes
            return True
        moved = sum(abs(share - self._planned.get(name, 0.0)) for name, share in shares.items())
        return moved > self.limits.moved

    def wake_at(self, now: float) -> float:
        return self._looked + self.limits.every if not self.due(now) else now + self.limits.every

    def seconds_of(self, index: int) -> float:
        """All loads that a node still needs."""
        resident = self._nodes[index].resident
        return sum(self._costs.load(m) for m in self.targets[index] if m not in resident)

    def at_most(self) -> int:
        return max(1, int(self.limits.at_once * len(self._nodes)))

    def pending(self) -> Iterator[int]:
        """Nodes that lack something of the plan, and do not load yet."""
        for index, models in list(self.targets.items()):
            node = self._nodes[index]
            if not node.up or all(model in node.resident for model in models):
                if not node.loading:
                    del self.targets[index]
                continue
            if not node.loading:
                yield index

    def next_load(self, index: int) -> Load:
        """The next model of the plan for an idle node, and what has to go for it."""
        node, wanted = self._nodes[index], self.targets[index]
        model = max(
            (each for each in wanted if each not in node.resident),
            key=lambda each: self._costs.models[each].nbytes,
        )
        free = node.memory - self.limits.spare_bytes - sum(node.resident.values())
        evict: list[str] = []
        for each in list(node.resident):
            if free >= self._costs.models[model].nbytes:
                break
            if each not in wanted:
                evict.append(each)
                free += node.resident[each]
        return Load(index, model, tuple(evict))


def _held(node: Node, units: Sequence[Unit]) -> frozenset[str]:
    return frozenset(
        unit.name
        for unit in units
        if all(m in node.resident or m in node.loading for m in unit.models)
    )


def _score(plan: Plan, units: Sequence[Unit]) -> float:
    """What a plan leaves to be wished: demand by replica, and much where there is none."""
    score = 0.0
    for unit in units:
        replicas = sum(unit.name in chosen for chosen in plan.values())
        score += unit.demand / replicas if replicas else 10.0 * unit.demand
    return score
