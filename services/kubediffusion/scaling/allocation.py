# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Who gets how much of a GPU budget that does not suffice."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kubediffusion.scaling.activation import Group
from kubediffusion.scaling.types import Budget, Decision, MetricState, ModelCase


@dataclass(slots=True)
class Allocation:
    """`replicas` of each model. `groups` are those that come up, in order; `blocked` says of each
    model that stays at zero though it is needed why it does."""

    replicas: dict[str, int] = field(default_factory=dict[str, int])
    groups: list[Group] = field(default_factory=list[Group])
    blocked: dict[str, str] = field(default_factory=dict[str, str])


def allocate(
    cases: Mapping[str, ModelCase],
    alone: Mapping[str, Decision],
    groups: Sequence[Group],
    budget: Budget,
) -> Allocation:
    """Never more than `alone` gives, and within the budget but for what is not taken back: the
    minimum of each model, its last replica, and all of one whose demand is not known."""
    handing = _Handing(cases, alone, budget.bound)
    handing.floors()
    handing.activate(groups)
    handing.more(lambda name: min(alone[name].replicas, cases[name].observation.current))
    handing.more(lambda name: alone[name].replicas)
    return handing.done


class _Handing:
    """Hands the budget out, one priority after the other."""

    def __init__(
        self, cases: Mapping[str, ModelCase], alone: Mapping[str, Decision], bound: int | None
    ) -> None:
        self.done = Allocation(dict.fromkeys(cases, 0))
        self._cases = cases
        self._alone = alone
        self._bound = bound
        self._left = 0 if bound is None else bound

    def floors(self) -> None:
        for name, case in self._cases.items():
            current, wanted = case.observation.current, self._alone[name].replicas
            known = case.observation.metrics.state is MetricState.KNOWN
            kept = max(case.limits.minimum, min(1, current) if known else current)
            self._give(name, min(wanted, kept))

    def activate(self, groups: Sequence[Group]) -> None:
        """The models of each group that are not up yet, all of them or none."""
        why: dict[str, str] = {}
        for group in groups:
            missing = [name for name in group.models if not self.done.replicas[name]]
            cost = sum(self._cases[name].gpus for name in missing)
            if group.cannot:
                text = f"{group.name} comes up whole or not at all: {group.cannot}"
            elif self._bound is not None and cost and cost > self._left:
                text = f"{group.name} needs {cost} GPUs to come up, and {max(0, self._left)} of "
                text += f"the {self._bound} for models here are left"
            else:
                for name in missing:
                    self._give(name, 1)
                self.done.groups.append(group)
                continue
            why |= {name: text for name in group.models if name not in why}
        self.done.blocked = {
            name: text for name, text in why.items() if not self.done.replicas[name]
        }

    def more(self, target: Callable[[str], int]) -> None:
        """Up to each model's target, one replica after the other, each to the model that then has
        the greatest load per replica."""
        heap = [
            (self._order(name), name)
            for name in self._cases
            if name not in self.done.blocked and self.done.replicas[name] < target(name)
        ]
        heapq.heapify(heap)
        while heap:
            _, name = heapq.heappop(heap)
            if not self._fits(name, 1):
                continue
            self._give(name, 1)
            if self.done.replicas[name] < target(name):
                heapq.heappush(heap, (self._order(name), name))

    def _order(self, name: str) -> tuple[float, int, str]:
        case, replicas = self._cases[name], self.done.replicas[name]
        load = case.observation.demand.total / case.limits.target
        return (-load / (replicas + 1), replicas, name)

    def _fits(self, name: str, replicas: int) -> bool:
        cost = replicas * self._cases[name].gpus
        return self._bound is None or not cost or cost <= self._left

    def _give(self, name: str, replicas: int) -> None:
        self.done.replicas[name] += replicas
        self._left -= replicas * self._cases[name].gpus
