# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Any model, any namespace: what the property tests draw from, and a world that obeys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hypothesis import strategies as st

from kubediffusion.scaling import (
    Book,
    Budget,
    Decision,
    Demand,
    Limits,
    Metrics,
    MetricState,
    ModelCase,
    Namespace,
    Observation,
    Policy,
    PolicyType,
    Rules,
    ScaleEvent,
    ScalingHistory,
    Select,
    WorkflowCase,
    decide,
    decide_all,
)

NOW = 10_000.0
TICK = 5.0

requests = st.integers(0, 60).map(float)
demands = st.builds(Demand, held=requests, queued=requests, running=requests, shed=st.floats(0, 30))
metrics = st.sampled_from(
    [
        Metrics(),
        Metrics(MetricState.PARTIAL, "GatewayDown", "one of two gateways"),
        Metrics(MetricState.UNKNOWN, "NoAnswer", "nobody answers"),
    ]
)
policies = st.builds(
    Policy,
    type=st.sampled_from(PolicyType),
    value=st.sampled_from([1, 2, 4, 25, 50, 100, 200]),
    period=st.sampled_from([5.0, 15.0, 60.0]),
)
rules = st.builds(
    Rules,
    window=st.sampled_from([0.0, 5.0, 30.0, 300.0]),
    policies=st.lists(policies, min_size=1, max_size=3).map(tuple),
    select=st.sampled_from(Select),
    tolerance=st.sampled_from([0.0, 0.1, 0.5]),
)


@st.composite
def limits(draw, least: int = 0) -> Limits:
    minimum = draw(st.integers(least, 6))
    return Limits(
        minimum=minimum,
        maximum=draw(st.integers(max(1, minimum), 20)),
        target=draw(st.sampled_from([0.5, 1.0, 2.0, 3.0])),
        up=draw(rules),
        down=draw(rules),
    )


@st.composite
def observations(draw, metrics=metrics) -> Observation:
    current = draw(st.integers(0, 20))
    stuck = draw(st.integers(0, current))
    ready = draw(st.integers(0, current - stuck))
    return Observation(
        current=current,
        demand=draw(demands),
        metrics=draw(metrics),
        ready=ready,
        starting=current - stuck - ready,
        stuck=stuck,
        stuck_reason="ImagePullBackOff" if stuck else "",
    )


@st.composite
def histories(draw) -> ScalingHistory:
    times = st.floats(0, 400).map(lambda ago: NOW - ago)
    history = ScalingHistory()
    for time, replicas in sorted(draw(st.lists(st.tuples(times, st.integers(0, 20)), max_size=8))):
        history = history.recommended(time, replicas, 3600)
    events = [ScaleEvent(t, c) for t, c in draw(st.lists(st.tuples(times, st.integers(-5, 5))))]
    return replace(history, events=tuple(sorted(events, key=lambda event: event.time)))


@st.composite
def cases(draw) -> ModelCase:
    observation = draw(observations())
    return ModelCase(
        observation,
        draw(limits()),
        draw(histories()),
        gpus=draw(st.integers(0, 2)),
        live=draw(st.integers(0, observation.current)),
        ending=draw(st.integers(0, 2)),
    )


@st.composite
def namespaces(draw) -> Namespace:
    names = [f"m{number}" for number in range(draw(st.integers(1, 5)))]
    workflow = st.builds(
        WorkflowCase,
        models=st.frozensets(st.sampled_from(names), min_size=1),
        held=st.none() | st.sampled_from([0.0, 1.0, 5.0]),
    )
    budget = st.builds(
        Budget,
        limit=st.none() | st.integers(0, 20),
        quota=st.none() | st.integers(0, 20),
        quota_used=st.integers(0, 20),
        reserved=st.integers(0, 3),
    )
    return Namespace(
        {name: draw(cases()) for name in names},
        draw(st.dictionaries(st.sampled_from(["w1", "w2", "w3"]), workflow)),
        draw(budget),
    )


class World:
    """A cluster that does what is decided: pods come at once, and go after `drain` ticks."""

    def __init__(self, namespace: Namespace, *, drain: int = 0) -> None:
        self.models = dict(namespace.models)
        self.workflows = namespace.workflows
        self.budget = namespace.budget
        self.now = NOW
        self._drain = drain
        self._book = Book()
        self._ending: dict[str, list[int]] = {name: [] for name in self.models}

    def demand(self, name: str, **parts: float) -> None:
        case = self.models[name]
        self.models[name] = replace(
            case, observation=replace(case.observation, demand=Demand(**parts))
        )

    def tick(self, seconds: float = TICK) -> Mapping[str, Decision]:
        """One round, and what it does."""
        done = decide_all(Namespace(self.models, self.workflows, self.budget), self._book, self.now)
        self._book = done.book
        for name, decision in done.decisions.items():
            case, history = self.models[name], done.histories[name]
            change = decision.replicas - case.observation.current
            if change:
                history = history.scaled(self.now, change, 3600)
            self._ending[name] = [
                *[left - 1 for left in self._ending[name] if left > 1],
                *([self._drain] * -change if self._drain else []),
            ]
            observation = replace(
                case.observation, current=decision.replicas, ready=decision.replicas
            )
            self.models[name] = replace(
                case,
                observation=observation,
                history=history,
                live=decision.replicas,
                ending=len(self._ending[name]),
            )
        self.now += seconds
        return done.decisions

    def replicas(self) -> dict[str, int]:
        return {name: case.observation.current for name, case in self.models.items()}

    def gpus(self) -> int:
        return sum((case.live + case.ending) * case.gpus for case in self.models.values())


def run_alone(
    observation: Observation, limits: Limits, ticks: int, seconds: float = TICK
) -> list[int]:
    """A model's replicas over time, of a process that starts with this."""
    history = ScalingHistory.begin(NOW, observation.current)
    series: list[int] = []
    for tick in range(ticks):
        now = NOW + tick * seconds
        decision = decide(observation, limits, history, now)
        history = history.recommended(now, decision.wanted, 3600)
        change = decision.replicas - observation.current
        if change:
            history = history.scaled(now, change, 3600)
        observation = replace(observation, current=decision.replicas, ready=decision.replicas)
        series.append(decision.replicas)
    return series
