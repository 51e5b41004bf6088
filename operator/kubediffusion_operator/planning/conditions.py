# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Conditions: built anew in each plan, and equal to the observed ones where nothing changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kubediffusion_operator.planning.names import generation_of, items, ref_of, status_of
from kubediffusion_operator.planning.types import EventRecord, Object

Status = Literal["True", "False", "Unknown"]

MAX_MESSAGE = 4096


@dataclass(frozen=True, slots=True)
class Condition:
    """One statement about an object. `reason` is CamelCase; the message says what to do."""

    type: str
    status: Status
    reason: str
    message: str = ""
    # An event tells of its coming.
    event: Literal["Normal", "Warning"] | None = None


def written(
    about: Object, wanted: Iterable[Condition], now: str
) -> tuple[list[dict[str, Any]], list[EventRecord]]:
    """The conditions as they are written, and an event for each that says something new.

    A condition's time changes with its status alone. An event comes with another status or
    reason, once.
    """
    known = {str(c["type"]): c for c in items(status_of(about), "conditions")}
    entries: list[dict[str, Any]] = []
    events: list[EventRecord] = []
    for condition in sorted(wanted, key=lambda c: c.type):
        before: Mapping[str, Any] = known.get(condition.type, {})
        same_status = before.get("status") == condition.status
        message = shortened(condition.message)
        entries.append(
            {
                "type": condition.type,
                "status": condition.status,
                "reason": condition.reason,
                "message": message,
                "lastTransitionTime": before["lastTransitionTime"] if same_status else now,
                "observedGeneration": generation_of(about),
            }
        )
        if condition.event and not (same_status and before.get("reason") == condition.reason):
            event = EventRecord(ref_of(about), condition.event, condition.reason, message)
            events.append(event)
    return entries, events


def unplanned(
    about: Object, known: Mapping[str, Any], why: str, now: str
) -> tuple[Object, list[EventRecord]]:
    """The status of an object that cannot be planned: what is `known` of it, and that it is not
    Ready. Gateways go on with the revision that it names."""
    failed = Condition("Ready", "False", "PlanningFailed", why, "Warning")
    (entry,), events = written(about, [failed], now)
    kept = [each for each in items(known, "conditions") if each.get("type") != failed.type]
    conditions = sorted([*kept, entry], key=lambda each: str(each.get("type")))
    status: Object = {
        **known,
        "observedGeneration": generation_of(about),
        "reason": failed.reason,
        "conditions": conditions,
    }
    return status, events


def shortened(text: str, limit: int = MAX_MESSAGE) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
