# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What was recommended and what was done lately: the memory of windows and rates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Recommendation:
    time: float
    replicas: int


@dataclass(frozen=True, slots=True)
class ScaleEvent:
    """`change` replicas were added, or taken away where it is negative."""

    time: float
    change: int


@dataclass(frozen=True, slots=True)
class ScalingHistory:
    recommendations: tuple[Recommendation, ...] = ()
    events: tuple[ScaleEvent, ...] = ()

    @classmethod
    def begin(cls, now: float, current: int, events: Iterable[ScaleEvent] = ()) -> ScalingHistory:
        """Of a process that has just started: what is there was right until now, so that a window
        has to pass before anything goes, and the rates go on from what was done before."""
        return cls((Recommendation(now, current),), tuple(events))

    def recommended(self, now: float, replicas: int, keep: float) -> ScalingHistory:
        """Older ones than `keep` seconds are forgotten."""
        kept = tuple(each for each in self.recommendations if each.time > now - keep)
        return replace(self, recommendations=(*kept, Recommendation(now, replicas)))

    def scaled(self, now: float, change: int, keep: float) -> ScalingHistory:
        kept = tuple(each for each in self.events if each.time > now - keep)
        return replace(self, events=(*kept, ScaleEvent(now, change)))

    def within(self, now: float, seconds: float) -> list[int]:
        """What was recommended in the last so many seconds."""
        return [each.replicas for each in self.recommendations if each.time > now - seconds]

    def added(self, now: float, seconds: float) -> int:
        """Replicas added in the last so many seconds, less those taken away."""
        return sum(each.change for each in self.events if each.time > now - seconds)
