# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A fleet whose nodes come and go by demand: the operator's own `scaling.decide`, on this clock.

A node that is asked for serves once it has started and loaded its models; one that is not wanted
any more takes nothing new, ends what it runs, and is gone then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kubediffusion.scaling import (
    Demand,
    Limits,
    Observation,
    ScalingHistory,
    decide,
)
from kubediffusion.simulate.engine import Simulation

# What was decided is remembered as long as any window of a Limits could ask for.
_MEMORY = 3600.0


@dataclass(frozen=True, slots=True)
class Autoscaling:
    """Looks every `interval` seconds; a node serves `startup` seconds after it was asked for.

    ``limits.minimum`` nodes are there at the start, and ``limits.maximum`` machines in all.
    """

    limits: Limits
    interval: float = 5.0
    startup: float = 30.0


@dataclass(slots=True)
class Autoscaler:
    """A hook of a simulation. `sizes` are the nodes asked for, from when on; `node_seconds` is what
    somebody pays for: from being asked for until gone."""

    settings: Autoscaling
    node_seconds: float = 0.0
    sizes: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    _history: ScalingHistory = field(init=False)
    _serving: set[int] = field(init=False)
    # When each of those that are on their way will serve.
    _starting: dict[int, float] = field(default_factory=dict[int, float])
    _ending: set[int] = field(default_factory=set[int])
    _paid_until: float = 0.0

    def __post_init__(self) -> None:
        least = self.settings.limits.minimum
        self._history = ScalingHistory.begin(0.0, least)
        self._serving = set(range(least))
        self.sizes.append((0.0, least))

    def __call__(self, simulation: Simulation, now: float) -> float | None:
        self._pay(simulation, now)
        current = len(self._serving) + len(self._starting)
        observation = Observation(
            current,
            Demand(running=simulation.in_system, shed=self._shed(simulation, now)),
            ready=len(self._serving),
            starting=len(self._starting),
        )
        decision = decide(observation, self.settings.limits, self._history, now)
        self._history = self._history.recommended(now, decision.wanted, _MEMORY)
        change = decision.replicas - current
        if change:
            self._history = self._history.scaled(now, change, _MEMORY)
            self.sizes.append((now, decision.replicas))
        for _ in range(change):
            self._add(simulation, now)
        for _ in range(-change):
            self._take(simulation)
        return now + self.settings.interval

    def finish(self, simulation: Simulation) -> None:
        """Pays for the time since the last look."""
        self._pay(simulation, simulation.now)

    def _pay(self, simulation: Simulation, now: float) -> None:
        gone = {index for index in self._ending if simulation.machines[index].idle}
        for index in gone:
            simulation.remove_node(index)
        there = len(self._serving) + len(self._starting) + len(self._ending)
        self.node_seconds += there * (now - self._paid_until)
        self._ending -= gone
        self._paid_until = now

    def _shed(self, simulation: Simulation, now: float) -> float:
        """What would run now had nobody been refused since the last look."""
        since = now - self.settings.interval
        refused = [number for number, at in simulation.outcome.shed.items() if at > since]
        solo = sum(simulation.jobs[number].solo for number in refused)
        return solo / self.settings.interval

    def _add(self, simulation: Simulation, now: float) -> None:
        """One that is on its way out stays; else the first that is off starts."""
        if self._ending:
            index = min(self._ending)
            self._ending.discard(index)
            self._serving.add(index)
            simulation.open_node(index)
            return
        taken = self._serving | self._starting.keys()
        index = next(i for i in range(len(simulation.machines)) if i not in taken)
        ready = now + self.settings.startup
        self._starting[index] = ready

        def started(simulation: Simulation, now: float) -> None:
            if self._starting.get(index) == ready:
                del self._starting[index]
                self._serving.add(index)
                simulation.open_node(index)

        simulation.at(ready, started)

    def _take(self, simulation: Simulation) -> None:
        """The one that would come last goes first, and of those that serve the last one."""
        if self._starting:
            del self._starting[max(self._starting)]
            return
        index = max(self._serving)
        self._serving.discard(index)
        self._ending.add(index)
        simulation.close_node(index)
