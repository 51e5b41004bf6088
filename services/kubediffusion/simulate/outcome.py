# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What may happen to a simulated fleet, how it is simulated, and what came out."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class FaultKind(IntEnum):
    LOST = 0
    SLOW = 1
    CUT_OFF = 2


@dataclass(frozen=True, slots=True)
class Fault:
    """At `time` a node is lost, takes `factor` times as long, or cannot be reached, until `until`
    (a lost one comes back empty)."""

    time: float
    node: int
    kind: FaultKind = FaultKind.LOST
    factor: float = 3.0
    until: float = float("inf")


@dataclass(frozen=True, slots=True)
class Options:
    """``noise`` is the standard deviation of the logarithm of run times; gateways hear of each
    other's work `report_interval` late, and of a lost node after `notice_seconds`; checkpoints are
    `checkpoint_steps` apart."""

    noise: float = 0.0
    seed: int = 0
    report_interval: float = 0.0
    notice_seconds: float = 0.5
    checkpoint_steps: int = 5
    faults: tuple[Fault, ...] = ()
    timeline: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """What a machine did from `start` to `end`."""

    node: int
    start: float
    end: float
    what: str
    kind: str
    jobs: tuple[int, ...] = ()


@dataclass(slots=True)
class Outcome:
    """When each request was done (None: never), and what it took."""

    finished: dict[int, float] = field(default_factory=dict[int, float])
    shed: dict[int, float] = field(default_factory=dict[int, float])
    spans: list[Span] = field(default_factory=list[Span])
    # (time, node, bytes of models), whenever these change; with `Options.timeline` only.
    memory: list[tuple[float, int, float]] = field(default_factory=list[tuple[float, int, float]])
    gpu_seconds: float = 0.0
    load_seconds: float = 0.0
    loads: int = 0
    peak_bytes: float = 0.0
    # Nodes times the seconds that they were there.
    node_seconds: float = 0.0
    end: float = 0.0
    events: int = 0
    starts: int = 0
    rounds: int = 0
    lost_steps: int = 0
    most_lost: int = 0
    declined: int = 0
