# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Whether to take a request now: it is kinder to refuse at once than to fail at the deadline."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

MIN_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """``max_queue`` images of all requests together, waiting or running, at one gateway."""

    max_queue: int = 1024


class ShedReason(Enum):
    QUEUE_FULL = "QueueFull"
    DEADLINE_INFEASIBLE = "DeadlineInfeasible"


@dataclass(frozen=True, slots=True)
class Admit:
    """Taken; done in about `expected_seconds`, where that is known."""

    expected_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Shed:
    reason: ShedReason
    # Seconds after which the same request may be taken.
    retry_after: float


def decide(
    *,
    work_ahead_seconds: float,
    solo_seconds: float | None,
    deadline_remaining: float | None,
    queue_len: int,
    limits: AdmissionLimits,
    images: int = 1,
) -> Admit | Shed:
    """Judge one request of `images` images.

    `work_ahead_seconds` is the wait at the busiest model it needs, `solo_seconds` its time alone
    (None before anything was measured, and then only the queue's bound counts). The bound is
    inclusive: a request that just fits is taken.
    """
    if queue_len + images > limits.max_queue:
        wait = work_ahead_seconds if work_ahead_seconds > 0.0 else (solo_seconds or 1.0)
        return Shed(ShedReason.QUEUE_FULL, bounded(wait))
    if solo_seconds is None:
        return Admit()
    expected = work_ahead_seconds + solo_seconds
    if deadline_remaining is not None and expected > deadline_remaining:
        return Shed(ShedReason.DEADLINE_INFEASIBLE, bounded(expected - deadline_remaining))
    return Admit(expected)


def bounded(seconds: float) -> float:
    """A wait that can be said to a client."""
    return min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
