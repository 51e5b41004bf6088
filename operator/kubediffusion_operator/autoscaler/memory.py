# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What the autoscaler remembers between rounds. All of it can be lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kubediffusion.scaling import Book, Decision, MetricState, ScalingHistory
from kubediffusion_operator.autoscaler.observe import Scaled
from kubediffusion_operator.autoscaler.status import (
    ACTIVE,
    HINDRANCES,
    HISTORY,
    METRICS,
    Entry,
    events_of,
    history_of,
    observed_conditions,
    of_decision,
    of_metrics,
)
from kubediffusion_operator.planning.conditions import Condition
from kubediffusion_operator.planning.names import uid_of

# A policy's period is at most half an hour.
EVENTS_SECONDS = 1800.0
# One round without complete numbers is a scrape that was late; two in a row are said.
DOUBTS = 2
# What kept a model from its replicas is said until it has not for so long.
LINGER_SECONDS = 60.0


@dataclass
class ModelMemory:
    """`decisions` are as in the status, newest first; `doubts` rounds in a row without complete
    numbers; `hindered` when something last kept it from its replicas, and what was said of it."""

    history: ScalingHistory
    decisions: tuple[Entry, ...] = ()
    doubts: int = 0
    hindered: tuple[float, Condition] | None = None

    @classmethod
    def first_seen(cls, model: Scaled, now: float) -> ModelMemory:
        decisions = history_of(model.object)
        events = events_of(decisions)
        history = ScalingHistory.begin(now, model.observation.current, events)
        return cls(history, decisions[:HISTORY])

    def scaled(self, now: float, change: int, entry: Entry) -> None:
        self.history = self.history.scaled(now, change, EVENTS_SECONDS)
        self.decisions = (entry, *self.decisions)[:HISTORY]

    def conditions(self, model: Scaled, decision: Decision, now: float) -> tuple[Condition, ...]:
        """To be called once a round. What flickers is said when it stays."""
        state = model.observation.metrics.state
        metrics = of_metrics(model.observation.metrics)
        active = of_decision(model.observation.metrics, decision)
        said = observed_conditions(model.object)
        self.doubts = 0 if state is MetricState.KNOWN else self.doubts + 1
        if 0 < self.doubts < DOUBTS and METRICS in said:
            metrics = said[METRICS]
            if state is MetricState.UNKNOWN:
                active = said.get(ACTIVE, active)
        if decision.reason in HINDRANCES:
            self.hindered = (now, active)
        elif decision.replicas > model.observation.current:
            self.hindered = None
        elif self.hindered is not None and now - self.hindered[0] < LINGER_SECONDS:
            active = self.hindered[1] if state is not MetricState.UNKNOWN else active
        return metrics, active


@dataclass
class Memory:
    """Of one namespace; models by uid."""

    book: Book = field(default_factory=Book)
    models: dict[str, ModelMemory] = field(default_factory=dict[str, ModelMemory])

    def of(self, model: Scaled, now: float) -> ModelMemory:
        uid = uid_of(model.object)
        known = self.models.get(uid)
        if known is None:
            known = self.models[uid] = ModelMemory.first_seen(model, now)
        return known

    def keep_only(self, models: Iterable[Scaled]) -> None:
        uids = {uid_of(model.object) for model in models}
        self.models = {uid: known for uid, known in self.models.items() if uid in uids}
