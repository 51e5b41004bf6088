# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One simulated accelerator: its models, its queue, and what it runs now."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.policy import Work

_EPS = 1e-9


class Running:
    """A work on its machine. `begin` is when its first call starts; `factor` stretches calls."""

    __slots__ = ("begin", "end", "factor", "revoked", "started", "token", "work")

    def __init__(self, work: Work, started: float, begin: float, factor: float, token: int) -> None:
        self.work = work
        self.started = started
        self.begin = begin
        self.factor = factor
        self.token = token
        self.revoked = False
        self.end = begin + factor * sum(call.count * call.seconds for call in work.calls)

    def progress(self, now: float) -> tuple[list[int], float]:
        """Forwards of each call that are done at the next boundary, and when that is."""
        done: list[int] = []
        at = self.begin
        for call in self.work.calls:
            each = call.seconds * self.factor
            whole = call.count * each
            if now >= at + whole - _EPS:
                done.append(call.count)
                at += whole
                continue
            if now > at and each > 0:
                started = min(call.count, math.ceil((now - at) / each - _EPS))
                done.append(started)
                at += started * each
            else:
                done.append(0)
            break
        done += [0] * (len(self.work.calls) - len(done))
        return done, max(at, now)


class Machine:
    __slots__ = (
        "busy_seconds",
        "factor",
        "host",
        "index",
        "load_seconds",
        "loads",
        "memory",
        "peak",
        "queue",
        "reserved_by",
        "resident",
        "running",
        "up",
        "used",
    )

    def __init__(self, index: int, host: int, memory: float) -> None:
        self.index = index
        self.host = host
        self.memory = memory
        self.resident: dict[str, float] = {}
        self.used = 0.0
        self.peak = 0.0
        self.queue: deque[Work] = deque()
        self.running: Running | None = None
        # A work that started on another machine and holds this one as its helper, or a load.
        self.reserved_by: object | None = None
        self.factor = 1.0
        self.up = True
        self.busy_seconds = 0.0
        self.load_seconds = 0.0
        self.loads = 0

    @property
    def idle(self) -> bool:
        return self.up and self.running is None and self.reserved_by is None and not self.queue

    def put(self, model: str, nbytes: float) -> None:
        self.resident[model] = nbytes
        self.used += nbytes
        self.peak = max(self.peak, self.used)

    def drop(self, model: str) -> None:
        self.used -= self.resident.pop(model)

    def make_resident(self, models: Iterable[str], costs: Costs) -> float:
        """Seconds to load those of `models` that are missing; least recently used ones make room.

        Raises ValueError where the models do not fit at all.
        """
        wanted = tuple(models)
        seconds = 0.0
        for model in wanted:
            nbytes = self.resident.pop(model, None)
            if nbytes is not None:
                self.resident[model] = nbytes  # the most recently used is last
                continue
            nbytes = costs.models[model].nbytes
            while self.used + nbytes > self.memory + 1.0:
                oldest = next((each for each in self.resident if each not in wanted), None)
                if oldest is None:
                    raise ValueError(
                        f"{', '.join(wanted)} do not fit into the {self.memory / 1e9:.1f} GB of "
                        f"node {self.index}: give it more memory, or plan fewer models"
                    )
                self.drop(oldest)
            self.put(model, nbytes)
            seconds += costs.load(model)
            self.loads += 1
        self.load_seconds += seconds
        return seconds
