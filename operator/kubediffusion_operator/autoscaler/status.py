# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What the autoscaler says of a model in its status. Pure.

Two conditions and `scalingHistory` are its own, under its own field manager. They change when
something happens, not with the load: numbers of the moment are in the history, with the decisions
that they led to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kubediffusion.scaling import Decision, Metrics, MetricState, Reason, ScaleEvent
from kubediffusion_operator.planning.conditions import Condition, written
from kubediffusion_operator.planning.names import status_of
from kubediffusion_operator.planning.types import Object

METRICS, ACTIVE = "MetricsAvailable", "ScalingActive"
TYPES = (METRICS, ACTIVE)
HISTORY = 10
MAX_MESSAGE = 1024
# What keeps a model from its replicas, and whether it can scale at all meanwhile.
HINDRANCES = {
    Reason.CANNOT_START: False,
    Reason.ACTIVATION_BLOCKED: False,
    Reason.WAITING_FOR_GPUS: True,
    Reason.BUDGET: True,
    Reason.BUDGET_SHARED: True,
}

Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Said:
    """What is to be said: the conditions, and the decisions, newest first."""

    conditions: tuple[Condition, ...]
    history: tuple[Entry, ...]


def of_left(reason: str, why: str) -> tuple[Condition, ...]:
    """Of a model that somebody else scales; nothing of one without any scaling."""
    return (Condition(ACTIVE, "False", reason, why),) if reason else ()


def of_metrics(metrics: Metrics) -> Condition:
    if metrics.state is MetricState.KNOWN:
        return Condition(METRICS, "True", metrics.reason, metrics.why)
    effect = (
        "replicas stay as they are"
        if metrics.state is MetricState.UNKNOWN
        else "replicas may rise and do not fall"
    )
    return Condition(METRICS, "False", metrics.reason, f"{metrics.why}; meanwhile {effect}")


def of_decision(metrics: Metrics, decision: Decision) -> Condition:
    if metrics.state is MetricState.UNKNOWN:
        why = "the demand is not known: see MetricsAvailable"
        return Condition(ACTIVE, "False", Reason.METRICS_UNKNOWN.value, why)
    if decision.reason in HINDRANCES:
        status = "True" if HINDRANCES[decision.reason] else "False"
        return Condition(ACTIVE, status, decision.reason.value, decision.hindrance)
    return Condition(ACTIVE, "True", "ScalingByDemand", "replicas follow the demand")


def entry(decision: Decision, before: int, now: float) -> Entry:
    """As `scalingHistory` has it."""
    message = decision.message
    if len(message) > MAX_MESSAGE:
        message = message[: MAX_MESSAGE - 1] + "…"
    return {
        "time": rfc3339(now),
        "fromReplicas": before,
        "toReplicas": decision.replicas,
        "reason": decision.reason.value,
        "message": message,
    }


def history_of(model: Object) -> tuple[Entry, ...]:
    return tuple(status_of(model).get("scalingHistory") or ())


def events_of(history: Sequence[Entry]) -> list[ScaleEvent]:
    """What an earlier process did, oldest first: rates go on from there."""
    events = [
        ScaleEvent(seconds(each["time"]), each["toReplicas"] - each["fromReplicas"])
        for each in history
    ]
    return sorted(events, key=lambda event: event.time)


def wanted_status(model: Object, said: Said, now: float) -> dict[str, Any] | None:
    """The status to apply, or None where the model's says all of it, and nothing else of ours."""
    conditions, _ = written(model, said.conditions, rfc3339(now))
    observed = status_of(model)
    ours = [c for c in observed.get("conditions") or () if c.get("type") in TYPES]
    if _by_type(ours) == _by_type(conditions) and history_of(model) == said.history:
        return None
    return {"conditions": conditions, "scalingHistory": [dict(each) for each in said.history]}


def observed_conditions(model: Object) -> dict[str, Condition]:
    """Those of ours that the status has."""
    return {
        str(c["type"]): Condition(c["type"], c["status"], c["reason"], c.get("message", ""))
        for c in status_of(model).get("conditions") or ()
        if c.get("type") in TYPES
    }


def _by_type(conditions: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    # The API server leaves nothing out of what we say, and adds nothing but empty messages.
    return {str(c["type"]): {"message": "", **c} for c in conditions}


def rfc3339(now: float) -> str:
    return datetime.fromtimestamp(int(now), UTC).isoformat().replace("+00:00", "Z")


def seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
