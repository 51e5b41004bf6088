# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Machines with a policy on them: what each policy starts from, by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kubediffusion.errors import InvalidInput
from kubediffusion.scheduling.costs import Costs, ModelCosts
from kubediffusion.scheduling.pipelines import Pipeline
from kubediffusion.scheduling.policies.dedicated import Dedicated, dedicated_plan
from kubediffusion.scheduling.policies.diflow import DiFlow, Tables
from kubediffusion.scheduling.policies.kubediffusion import KubeDiffusion, Parameters
from kubediffusion.scheduling.policies.monolith import (
    Partitioned,
    Swapping,
    equal_partition,
    load_partition,
    pipeline_loads,
)
from kubediffusion.scheduling.policies.planner import Limits, Planner
from kubediffusion.scheduling.policy import Node, Policy
from kubediffusion.scheduling.residency import Room, models_of, plan_units, units_of
from kubediffusion.simulate.machines import Machine
from kubediffusion.simulate.settings import Setting


@dataclass(slots=True)
class Fleet:
    """Machines and, for each gateway, a policy with its own records of them."""

    machines: list[Machine]
    policies: list[Policy]
    costs: Costs


@dataclass(frozen=True, slots=True)
class Build:
    """All that a policy may depend on. `mix` is the share of each workflow in the requests."""

    setting: Setting
    costs: Costs
    gpus: int
    mix: Mapping[str, float]
    gateways: int = 1
    tables: Tables = field(default_factory=Tables)
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    # So many nodes are there at the start; None: all.
    initial: int | None = None

    @property
    def pipelines(self) -> list[Pipeline]:
        return self.setting.families.all()


def with_pipelines(build: Build) -> Costs:
    """The costs, with each whole pipeline as one more model."""
    costs, sizes = build.costs, build.setting.pipeline_bytes
    whole = {
        p.name: ModelCosts(
            sum(costs.models[model].load_seconds for model in p.models),
            sizes.get(p.name, costs.nbytes(p.models)),
        )
        for p in build.pipelines
    }
    return Costs({**costs.models, **whole}, costs.same_host, costs.cross_host, costs.load_scale)


def build_fleet(name: str, build: Build) -> Fleet:
    """Machines and policies for a policy's name. Raises InvalidInput for another name."""
    maker = _MAKERS.get(name)
    if maker is None:
        raise InvalidInput(f"there is no policy '{name}': take one of {', '.join(POLICIES)}")
    if build.initial is not None and name not in ELASTIC:
        raise InvalidInput(
            f"policy '{name}' is of nodes that stay: autoscaling goes with {', '.join(ELASTIC)}"
        )
    return maker(build)


def _machines(build: Build, memory: float) -> list[Machine]:
    per_host = build.setting.gpus_per_host
    machines = [Machine(i, i // per_host, memory) for i in range(build.gpus)]
    for machine in machines[build.initial :] if build.initial is not None else ():
        machine.up = False
    return machines


def records(machines: Sequence[Machine]) -> list[Node]:
    """What a scheduler knows of the machines at the start: everything."""
    return [
        Node(each.index, each.host, each.memory, dict(each.resident), up=each.up)
        for each in machines
    ]


def _hold(machines: Sequence[Machine], plan: Mapping[int, Sequence[str]], costs: Costs) -> None:
    for index, models in plan.items():
        for model in models:
            machines[index].put(model, costs.models[model].nbytes)


def _partitioned(shares_of: Callable[[Build], list[int]]) -> Callable[[Build], Fleet]:
    def make(build: Build) -> Fleet:
        costs = with_pipelines(build)
        shares = shares_of(build)
        machines = _machines(build, build.setting.monolith_bytes)
        policies: list[Policy] = []
        for _ in range(build.gateways):
            policy = Partitioned(records(machines), costs, build.pipelines, shares)
            policies.append(policy)
        _hold(machines, Partitioned([], costs, build.pipelines, shares).plan(), costs)
        return Fleet(machines, policies, costs)

    return make


def _swapping(*, aware: bool) -> Callable[[Build], Fleet]:
    def make(build: Build) -> Fleet:
        costs = with_pipelines(build)
        machines = _machines(build, build.setting.monolith_bytes)
        names = [pipeline.name for pipeline in build.pipelines]
        at = 0
        for machine in machines:
            for _ in names:
                name = names[at % len(names)]
                if machine.used + costs.models[name].nbytes > machine.memory:
                    break
                if name not in machine.resident:
                    machine.put(name, costs.models[name].nbytes)
                at += 1
        policies: list[Policy] = [
            Swapping(records(machines), costs, aware=aware) for _ in range(build.gateways)
        ]
        return Fleet(machines, policies, costs)

    return make


def _equal(build: Build) -> list[int]:
    return equal_partition(build.pipelines, build.gpus)


def _by_load(build: Build) -> list[int]:
    return load_partition(pipeline_loads(build.pipelines, build.costs, build.mix), build.gpus)


def _kubediffusion(**preset: Any) -> Callable[[Build], Fleet]:
    def make(build: Build) -> Fleet:
        setting, costs = build.setting, build.costs
        given = {**preset, **build.parameters}
        follows = given.pop("follow", True)
        machines = _machines(build, given.pop("node_bytes", setting.node_bytes))
        spare = setting.activation_bytes
        there = [each for each in machines if each.up]
        units = units_of(build.pipelines, costs, build.mix, len(there))
        rooms = [Room(each.index, each.memory - spare) for each in there]
        plan = models_of(plan_units(units, rooms), units)
        # Nodes that come later are replicas of those that are there.
        _hold(machines, {each.index: plan[each.index % len(there)] for each in machines}, costs)
        policies: list[Policy] = []
        for gateway in range(build.gateways):
            nodes = records(machines)
            limits = Limits(spare_bytes=spare)
            # One planner, whoever has it: here the first gateway.
            planner = (
                Planner(nodes, costs, build.pipelines, build.mix, limits)
                if follows and gateway == 0
                else None
            )
            parameters = replace(Parameters(), shared=build.gateways > 1, **given)
            policies.append(KubeDiffusion(nodes, costs, build.pipelines, parameters, planner))
        return Fleet(machines, policies, costs)

    return make


def _dedicated(build: Build) -> Fleet:
    costs = build.costs
    machines = _machines(build, build.setting.node_bytes)
    plan = dedicated_plan(build.pipelines, costs, build.mix, build.gpus)
    _hold(machines, plan, costs)
    policies: list[Policy] = [Dedicated(records(machines), costs) for _ in range(build.gateways)]
    return Fleet(machines, policies, costs)


def _diflow(*, early_abort: bool = True) -> Callable[[Build], Fleet]:
    def make(build: Build) -> Fleet:
        setting, costs = build.setting, build.costs
        machines = _machines(build, setting.node_bytes)
        families = list(setting.families.pipelines.values())
        for machine in machines:
            for turn in range(len(families)):
                family = families[(machine.index + turn) % len(families)]
                for model in dict.fromkeys(m for each in family.values() for m in each.models):
                    nbytes = costs.models[model].nbytes
                    if model not in machine.resident and machine.used + nbytes <= machine.memory:
                        machine.put(model, nbytes)
        tables = replace(build.tables, early_abort=early_abort)
        policies: list[Policy] = [
            DiFlow(records(machines), costs, build.pipelines, tables) for _ in range(build.gateways)
        ]
        return Fleet(machines, policies, costs)

    return make


_MAKERS: dict[str, Callable[[Build], Fleet]] = {
    "diffusers": _partitioned(_equal),
    "shepherd": _partitioned(_by_load),
    "clockwork": _swapping(aware=False),
    "clockwork-aware": _swapping(aware=True),
    "dedicated": _dedicated,
    "diflow": _diflow(),
    "diflow-no-abort": _diflow(early_abort=False),
    "kubediffusion": _kubediffusion(),
    "kubediffusion-fair": _kubediffusion(laxity=1.0, floor=0.9),
}
POLICIES = tuple(_MAKERS)
# Those that take nodes which come and go.
ELASTIC = ("kubediffusion", "kubediffusion-fair")
