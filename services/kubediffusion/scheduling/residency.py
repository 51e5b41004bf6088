# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which models lie on which nodes: planned from demand, ahead of it.

A load of seconds blocks an accelerator and eats the slack of whoever waits for it, so residency
follows a plan and no request ever causes a load. The plan is over *units*: models that are always
used together (the text encoders of one family; a denoiser with its decoder). A unit that helps
another (a ControlNet) only counts beside it. With demand d_u (accelerator seconds a second) and
n_u replicas, the plan maximises

    sum over units of  -d_u / n_u          (more replicas, with diminishing returns)

subject to the memory of each node and to the least replicas of each unit. It is found by
coordinate ascent: in turn each node takes the subset of units that is worth most given what the
others hold, until none changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.pipelines import Pipeline

# Beyond so many units that could still go on a node, subsets are built greedily.
_EXACT_UNITS = 18
_PASSES = 6
# What the first replica of anything is worth: more than all that could be gained otherwise.
_MUST = 1e6


@dataclass(frozen=True, slots=True)
class Unit:
    """Models that are loaded and evicted together. `beside`: counts only where that unit is."""

    name: str
    models: tuple[str, ...]
    sizes: tuple[float, ...]
    demand: float
    beside: str = ""
    least: int = 1

    @property
    def nbytes(self) -> float:
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Room:
    """A node to plan for. `held` is what it has: keeping it costs no load."""

    index: int
    nbytes: float
    held: frozenset[str] = frozenset()


Plan = dict[int, frozenset[str]]


def _sizes(models: Sequence[str], costs: Costs) -> tuple[float, ...]:
    return tuple(costs.models[model].nbytes for model in models)


def units_of(
    pipelines: Sequence[Pipeline], costs: Costs, demand: Mapping[str, float], nodes: int
) -> list[Unit]:
    """`demand` is in requests a second by workflow (any unit: only proportions matter)."""
    text: dict[tuple[str, ...], float] = {}
    cores: dict[tuple[str, ...], float] = {}
    helpers: dict[tuple[str, str], float] = {}
    for each in pipelines:
        rate = demand.get(each.name, 0.0)
        encoding = rate * each.encode_seconds(costs, each.prompts)
        text[each.encoders] = text.get(each.encoders, 0.0) + encoding
        core = (each.denoiser, each.decoder)
        denoising = rate * each.steps * each.step_seconds(costs, each.branches)
        cores[core] = cores.get(core, 0.0) + denoising + rate * each.decode_seconds(costs)
        for control in each.controls:
            key = (control, each.denoiser)
            helpers[key] = helpers.get(key, 0.0) + denoising
    total = sum(text.values()) + sum(cores.values()) or 1.0
    least = 1 if nodes < 4 else max(2, nodes // 8)
    out = [
        Unit("+".join(models), models, _sizes(models, costs), value / total, least=least)
        for models, value in text.items()
    ]
    out += [
        Unit(models[0], models, _sizes(models, costs), value / total, least=least)
        for models, value in cores.items()
    ]
    out += [
        Unit(f"{control}@{core}", (control,), _sizes((control,), costs), value / total, core, least)
        for (control, core), value in helpers.items()
    ]
    return out


def plan_units(
    units: Sequence[Unit], rooms: Sequence[Room], start: Plan | None = None, keep: float = 0.0
) -> Plan:
    """Units for each room, beginning from `start`; a unit that a room already holds is worth
    `keep` times its gain more, so that a plan does not change for nothing."""
    plan: Plan = {room.index: frozenset() for room in rooms}
    if start is not None:
        plan |= {room.index: start.get(room.index, frozenset()) for room in rooms}
    counts = {unit.name: sum(unit.name in held for held in plan.values()) for unit in units}
    planner = _Planner(units, counts, keep)
    for _ in range(_PASSES):
        changed = False
        for room in rooms:
            for name in plan[room.index]:
                if name in counts:
                    counts[name] -= 1
            chosen = planner.best(room, plan[room.index])
            for name in chosen:
                counts[name] += 1
            changed = changed or chosen != plan[room.index]
            plan[room.index] = chosen
        if not changed:
            break
    return plan


class _Planner:
    def __init__(self, units: Sequence[Unit], counts: dict[str, int], keep: float) -> None:
        self._units = sorted(units, key=lambda unit: (bool(unit.beside), -unit.nbytes, unit.name))
        self._counts = counts
        self._keep = keep
        self._best: tuple[float, frozenset[str]] = (0.0, frozenset())
        # Like nodes get like answers: most of a large fleet is asked once.
        self._known: dict[tuple[float, ...], frozenset[str]] = {}

    def best(self, room: Room, planned: frozenset[str]) -> frozenset[str]:
        worth = {unit.name: self._worth(unit, room, planned) for unit in self._units}
        key = (room.nbytes, *worth.values())
        if key not in self._known:
            self._known[key] = self._search(room, worth)
        return self._known[key]

    def _search(self, room: Room, worth: Mapping[str, float]) -> frozenset[str]:
        units = [
            each for each in self._units if each.nbytes <= room.nbytes and worth[each.name] > 0
        ]
        units.sort(key=lambda each: (bool(each.beside), -worth[each.name] / max(each.nbytes, 1.0)))
        if len(units) > _EXACT_UNITS:
            return _greedy(units, worth, room.nbytes)
        self._best = (-1.0, frozenset())
        rest = [0.0] * (len(units) + 1)
        for i in range(len(units) - 1, -1, -1):
            rest[i] = rest[i + 1] + worth[units[i].name]
        self._branch(units, worth, rest, 0, room.nbytes, 0.0, [], set())
        return self._best[1]

    def _branch(
        self,
        units: Sequence[Unit],
        worth: Mapping[str, float],
        rest: Sequence[float],
        at: int,
        room: float,
        value: float,
        chosen: list[str],
        models: set[str],
    ) -> None:
        """Branch and bound over which units to take."""
        if value > self._best[0]:
            self._best = (value, frozenset(chosen))
        if at == len(units) or value + rest[at] <= self._best[0]:
            return
        unit = units[at]
        # A ControlNet that two denoisers use lies on the node once.
        new = [model for model in unit.models if model not in models]
        sizes = zip(unit.models, unit.sizes, strict=True)
        nbytes = sum(size for model, size in sizes if model in new)
        if nbytes <= room and (not unit.beside or unit.beside in chosen):
            chosen.append(unit.name)
            models.update(new)
            self._branch(
                units, worth, rest, at + 1, room - nbytes, value + worth[unit.name], chosen, models
            )
            models.difference_update(new)
            chosen.pop()
        self._branch(units, worth, rest, at + 1, room, value, chosen, models)

    def _worth(self, unit: Unit, room: Room, planned: frozenset[str]) -> float:
        others = self._counts[unit.name]
        if others < unit.least:
            gain = _MUST * (unit.demand + 1e-3) / (others + 1)
        else:
            gain = unit.demand / (others * (others + 1))
        if unit.name in planned or unit.name in room.held:
            gain *= 1.0 + self._keep
        return gain


def _greedy(units: Sequence[Unit], worth: Mapping[str, float], room: float) -> frozenset[str]:
    chosen: set[str] = set()
    order = sorted(units, key=lambda unit: -worth[unit.name] / max(unit.nbytes, 1.0))
    for unit in order + [unit for unit in order if unit.beside]:
        fits = unit.nbytes <= room and unit.name not in chosen
        if fits and (not unit.beside or unit.beside in chosen):
            chosen.add(unit.name)
            room -= unit.nbytes
    return frozenset(chosen)


def models_of(plan: Plan, units: Sequence[Unit]) -> dict[int, tuple[str, ...]]:
    """The models of each node, largest units first."""
    order = {unit.name: unit for unit in units}
    return {
        index: tuple(
            dict.fromkeys(
                model
                for name in sorted(chosen, key=lambda name: (-order[name].nbytes, name))
                for model in order[name].models
            )
        )
        for index, chosen in plan.items()
    }
