# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Machines carry out works, first in, first out, on one clock.

A work is one event: its end, or the step boundary where it is revoked. What policies make of it is
`engine`'s part.
"""

from __future__ import annotations

import heapq
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum

from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.policy import Work
from kubediffusion.simulate.machines import Machine, Running
from kubediffusion.simulate.outcome import Options, Outcome, Span


class Kind(IntEnum):
    ARRIVAL = 0
    END = 1
    LOADED = 2
    FAULT = 3
    NOTICED = 4
    WAKE = 5
    REPORT = 6
    SCALE = 7


class Floor(ABC):
    """`outcome` counts what the machines do; `now` is the clock."""

    def __init__(
        self, machines: Sequence[Machine], costs: Costs, options: Options | None = None
    ) -> None:
        self.machines = machines
        self.costs = costs
        self.options = options or Options()
        self.outcome = Outcome()
        self.now = 0.0
        self._random = random.Random(self.options.seed)
        self._heap: list[tuple[float, int, int, object]] = []
        self._serial = 0
        # Works under way that wait for the end of another, by that one's identity.
        self._waiting_for: dict[int, list[Running]] = {}

    @abstractmethod
    def _show(self, machine: Machine) -> None:
        """Its models changed: whoever keeps a record of it hears."""

    def _push(self, time: float, kind: Kind, body: object) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (time, self._serial, int(kind), body))

    def _begin(self, machine: Machine, work: Work) -> None:
        now = self.now
        loading = machine.make_resident(work.models, self.costs) if work.models else 0.0
        if loading:
            self._show(machine)
            self._span(machine.index, now, now + loading, "+".join(work.models), "load")
        for helper in work.helpers:
            self.machines[helper].reserved_by = work
        factor = machine.factor
        for helper in work.helpers:
            factor = max(factor, self.machines[helper].factor)
        if self.options.noise:
            factor *= self._random.lognormvariate(0.0, self.options.noise)
        self._serial += 1
        running = Running(work, now, now + loading + work.setup, factor, self._serial)
        machine.running = running
        after = work.after
        if after is not None and not after.ended:
            # Known when its producer ends: the event is pushed then.
            self._waiting_for.setdefault(id(after), []).append(running)
            return
        self._push(running.end, Kind.END, (machine.index, running.token))

    def _revoke(self, work: Work) -> None:
        running = self.machines[work.node].running
        if running is None or running.work is not work or running.revoked:
            return
        done, boundary = running.progress(self.now)
        if boundary >= running.end - 1e-9:
            return
        running.revoked = True
        work.done = done
        self._serial += 1
        running.token = self._serial
        running.end = boundary
        self._push(boundary, Kind.END, (work.node, running.token))

    def _account(self, machine: Machine, running: Running) -> None:
        work = running.work
        busy = self.now - running.started
        machine.busy_seconds += busy
        for helper in work.helpers:
            self.machines[helper].busy_seconds += busy
        if self.options.timeline:
            jobs = tuple(job.id for job in work.jobs)
            what = work.calls[0].model if len(work.calls) == 1 else work.jobs[0].pipeline.name
            for index in (work.node, *work.helpers):
                self._span(index, running.started, self.now, what, "run", jobs)

    def _free_helpers(self, work: Work) -> None:
        for helper in work.helpers:
            machine = self.machines[helper]
            if machine.reserved_by is work:
                machine.reserved_by = None
                if machine.queue and machine.running is None and machine.up:
                    self._begin(machine, machine.queue.popleft())

    def _release(self, waiter: Running) -> None:
        """The deferred input is there: the consumer ends `tail` later at the earliest."""
        waiter.end = max(waiter.end, self.now + waiter.work.tail * waiter.factor)
        self._push(waiter.end, Kind.END, (waiter.work.node, waiter.token))

    # ---------------------------------------------------------------- failing

    def take_down(self, index: int, *, empty: bool) -> list[Work]:
        """The machine is gone, with its work and, where `empty`, its models."""
        machine = self.machines[index]
        lost: list[Work] = []
        running = machine.running
        reserved = machine.reserved_by
        if running is None and isinstance(reserved, Work):
            running = self.machines[reserved.node].running
        if running is not None:
            work = running.work
            work.done = self._kept(running)
            owner = self.machines[work.node]
            owner.running = None
            self._account(owner, running)
            self._free_helpers(work)
            lost.append(work)
            if owner.index != index and owner.queue and owner.up:
                self._begin(owner, owner.queue.popleft())
        for work in machine.queue:
            work.done = [0] * len(work.calls)
            lost.append(work)
        machine.queue.clear()
        machine.reserved_by = None
        machine.up = False
        if empty:
            for model in list(machine.resident):
                machine.drop(model)
        return lost

    def _kept(self, running: Running) -> list[int]:
        """What the last checkpoint holds: whole calls, and steps up to the interval's multiple."""
        done, _ = running.progress(self.now)
        every = self.options.checkpoint_steps
        for i, call in enumerate(running.work.calls):
            if done[i] < call.count:
                completed = max(0, done[i] - 1)  # `progress` counts the step under way
                done[i] = completed - completed % every
                steps = completed - done[i]
                self.outcome.lost_steps += steps
                self.outcome.most_lost = max(self.outcome.most_lost, steps)
                break
        return done

    def _note_memory(self, machine: Machine) -> None:
        if self.options.timeline:
            held = machine.used if machine.up else 0.0
            self.outcome.memory.append((self.now, machine.index, held))

    def _span(
        self, node: int, start: float, end: float, what: str, kind: str, jobs: tuple[int, ...] = ()
    ) -> None:
        if self.options.timeline:
            self.outcome.spans.append(Span(node, start, end, what, kind, jobs))
