# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The discrete-event core: machines carry out what policies decide.

Everything that happens at one instant is told before the policies are asked, so that simultaneous
arrivals are seen together. Several gateways each have a policy of their own over the same machines:
what the others do they learn from reports that are `report_interval` seconds apart, and a machine
that is taken declines what assumed that it is idle.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.pipelines import Job
from kubediffusion.scheduling.policy import (
    Action,
    Finish,
    Load,
    Policy,
    Revoke,
    Shed,
    Start,
    Work,
)
from kubediffusion.simulate.floor import Floor, Kind
from kubediffusion.simulate.machines import Machine
from kubediffusion.simulate.outcome import Fault, FaultKind, Options, Outcome

# A gateway whose work was declined leaves the node alone for so many seconds at least.
_ASK_AGAIN = 0.01

Hook = Callable[["Simulation", float], float | None]


class Simulation(Floor):
    """Jobs sorted by arrival; `gateway_of(job)` names the policy that it comes to."""

    def __init__(
        self,
        machines: Sequence[Machine],
        policies: Sequence[Policy],
        jobs: Sequence[Job],
        costs: Costs,
        options: Options | None = None,
        gateway_of: Callable[[Job], int] | None = None,
        hooks: Sequence[tuple[float, Hook]] = (),
    ) -> None:
        super().__init__(machines, costs, options)
        self.policies = policies
        self.jobs = jobs
        self._gateway_of = gateway_of or _only_gateway
        self._touched: set[int] = set()
        self._owner: dict[int, int] = {}
        self._open = len(jobs)
        self._came = 0
        self._hooks = list(hooks)
        # Works that were lost with a node that nobody knows to be lost.
        self._unnoticed: dict[int, list[Work]] = {}
        self._wakes: list[float | None] = [None] * len(policies)

    # ---------------------------------------------------------------- the loop

    def run(self) -> Outcome:
        self._prepare()
        heap, jobs, at = self._heap, self.jobs, 0
        handlers: dict[int, Callable[[Any], None]] = {
            Kind.END: self._on_end,
            Kind.LOADED: self._on_loaded,
            Kind.FAULT: self._on_fault,
            Kind.NOTICED: self._on_noticed,
            Kind.WAKE: self._on_wake,
            Kind.REPORT: self._on_report,
            Kind.SCALE: self._on_scale,
        }
        infinity = float("inf")
        while self._open:
            arrival = jobs[at].arrival if at < len(jobs) else infinity
            event = heap[0][0] if heap else infinity
            now = min(arrival, event)
            if now == infinity:
                break
            self.now = now
            while at < len(jobs) and jobs[at].arrival <= now:
                self._arrive(jobs[at])
                at += 1
            while heap and heap[0][0] <= now:
                _, _, kind, body = heapq.heappop(heap)
                self.outcome.events += 1
                handlers[kind](body)
            self._decide()
        outcome = self.outcome
        outcome.end = self.now
        outcome.gpu_seconds = sum(machine.busy_seconds for machine in self.machines)
        outcome.load_seconds = sum(machine.load_seconds for machine in self.machines)
        outcome.loads = sum(machine.loads for machine in self.machines)
        outcome.peak_bytes = sum(machine.peak for machine in self.machines)
        return outcome

    def _prepare(self) -> None:
        for fault in self.options.faults:
            self._push(fault.time, Kind.FAULT, fault)
        if len(self.policies) > 1 and self.options.report_interval > 0:
            self._push(self.options.report_interval, Kind.REPORT, None)
        for time, hook in self._hooks:
            self._push(time, Kind.SCALE, hook)
        for machine in self.machines:
            self._show(machine)
        for policy in self.policies:
            policy.fleet_changed(0.0)
        self._touched.update(range(len(self.policies)))
        self._decide()

    def _arrive(self, job: Job) -> None:
        self._came += 1
        gateway = self._gateway_of(job)
        self.policies[gateway].arrived(job, self.now)
        self._touched.add(gateway)

    def _decide(self) -> None:
        touched = self._touched
        while touched:
            gateway = touched.pop()
            policy = self.policies[gateway]
            self.outcome.rounds += 1
            for action in policy.decide(self.now):
                self._act(gateway, action)
            wake = policy.wake_at(self.now)
            if wake is not None and wake != self._wakes[gateway]:
                self._wakes[gateway] = wake
                self._push(wake, Kind.WAKE, gateway)

    # ---------------------------------------------------------------- actions

    def _act(self, gateway: int, action: Action) -> None:
        if isinstance(action, Start):
            self.outcome.starts += 1
            self._start(gateway, action.work)
        elif isinstance(action, Finish):
            self.outcome.finished[action.job.id] = self.now
            self._open -= 1
        elif isinstance(action, Shed):
            self.outcome.shed[action.job.id] = self.now
            self._open -= 1
        elif isinstance(action, Revoke):
            self._revoke(action.work)
        else:
            self._load(gateway, action)

    def _start(self, gateway: int, work: Work) -> None:
        self._owner[id(work)] = gateway
        machine = self.machines[work.node]
        if len(self.policies) > 1 and not self._takes(work):
            self.outcome.declined += 1
            work.done = [0] * len(work.calls)
            work.ended = True
            self._tell_foreign(gateway, work)
            self.policies[gateway].ended(work, self.now)
            self._touched.add(gateway)
            return
        down = next((i for i in (work.node, *work.helpers) if not self.machines[i].up), None)
        if down is not None:
            self._start_on_lost(down, work)
            return
        if machine.running is None and machine.reserved_by is None:
            self._begin(machine, work)
        else:
            machine.queue.append(work)

    def _start_on_lost(self, index: int, work: Work) -> None:
        """Lost with its node; the policy hears of it when that is noticed."""
        work.done = [0] * len(work.calls)
        lost = self._unnoticed.get(index)
        if lost is None:
            self._push(self.now, Kind.NOTICED, _Noticed(index, [work]))
        else:
            lost.append(work)

    def _takes(self, work: Work) -> bool:
        return all(self.machines[each].idle for each in (work.node, *work.helpers))

    def _tell_foreign(self, gateway: int, work: Work) -> None:
        """A machine that declines says what it is busy with."""
        for index in (work.node, *work.helpers):
            node = self.policies[gateway].nodes[index]
            node.foreign_until = self._foreign(self.machines[index], gateway)
            if not self.machines[index].idle:
                node.foreign_until = max(node.foreign_until, self.now + _ASK_AGAIN)

    def _load(self, gateway: int, action: Load) -> None:
        machine = self.machines[action.node]
        if not machine.idle or action.model in machine.resident:
            return
        for model in action.evict:
            if model in machine.resident:
                machine.drop(model)
        nbytes = self.costs.models[action.model].nbytes
        if machine.used + nbytes > machine.memory + 1.0:
            self._show(machine)
            return
        machine.reserved_by = action
        machine.peak = max(machine.peak, machine.used + nbytes)
        seconds = self.costs.load(action.model)
        machine.loads += 1
        machine.load_seconds += seconds
        self._show(machine)
        for policy in self.policies:
            policy.nodes[action.node].loading[action.model] = self.now + seconds
        self._span(machine.index, self.now, self.now + seconds, action.model, "load")
        self._push(self.now + seconds, Kind.LOADED, action)

    # ---------------------------------------------------------------- events

    def _on_end(self, body: tuple[int, int]) -> None:
        index, token = body
        machine = self.machines[index]
        running = machine.running
        if running is None or running.token != token:
            return
        work = running.work
        if not running.revoked:
            work.done = [call.count for call in work.calls]
        work.ended = True
        machine.running = None
        self._account(machine, running)
        self._free_helpers(work)
        for waiter in self._waiting_for.pop(id(work), ()):
            self._release(waiter)
        gateway = self._owner.pop(id(work))
        if machine.queue:
            self._begin(machine, machine.queue.popleft())
        self.policies[gateway].ended(work, self.now)
        self._touched.add(gateway)

    def _on_loaded(self, action: Load) -> None:
        machine = self.machines[action.node]
        if machine.reserved_by is not action:
            return
        machine.reserved_by = None
        machine.busy_seconds += self.costs.load(action.model)
        machine.put(action.model, self.costs.models[action.model].nbytes)
        self._show(machine)
        for gateway, policy in enumerate(self.policies):
            policy.nodes[action.node].loading.pop(action.model, None)
            policy.fleet_changed(self.now)
            self._touched.add(gateway)
        if machine.queue and machine.up:
            self._begin(machine, machine.queue.popleft())

    def _show(self, machine: Machine) -> None:
        self._note_memory(machine)
        for policy in self.policies:
            policy.nodes[machine.index].resident = dict(machine.resident)

    def _on_wake(self, gateway: int) -> None:
        self._wakes[gateway] = None
        self._touched.add(gateway)

    def _on_report(self, _: object) -> None:
        """Every gateway hears what runs on every node, as it is now."""
        for gateway, policy in enumerate(self.policies):
            for machine in self.machines:
                policy.nodes[machine.index].foreign_until = self._foreign(machine, gateway)
            self._touched.add(gateway)
        self._push(self.now + self.options.report_interval, Kind.REPORT, None)

    def _foreign(self, machine: Machine, gateway: int) -> float:
        running = machine.running
        if running is None and isinstance(machine.reserved_by, Work):
            running = self.machines[machine.reserved_by.node].running
        if running is None or self._owner[id(running.work)] == gateway:
            return 0.0
        return running.end

    def _on_scale(self, hook: Hook) -> None:
        following = hook(self, self.now)
        if following is not None:
            self._push(following, Kind.SCALE, hook)

    # ---------------------------------------------------------------- nodes that come and go

    @property
    def in_system(self) -> int:
        """Requests that have come and are neither finished nor shed."""
        return self._came - len(self.outcome.finished) - len(self.outcome.shed)

    def at(self, time: float, hook: Hook) -> None:
        """Calls `hook` then, and again when it says."""
        self._push(time, Kind.SCALE, hook)

    def open_node(self, index: int) -> None:
        """It serves from now on, with the models that it has."""
        self._switch(index, up=True)
        self._tell_up(index, up=True)

    def close_node(self, index: int) -> None:
        """It ends what it runs, and is given nothing any more."""
        self._tell_up(index, up=False)

    def remove_node(self, index: int) -> None:
        """One that was closed, and runs nothing any more, is gone."""
        self._switch(index, up=False)

    def _switch(self, index: int, *, up: bool) -> None:
        self.machines[index].up = up
        self._note_memory(self.machines[index])

    def _tell_up(self, index: int, *, up: bool) -> None:
        for gateway, policy in enumerate(self.policies):
            policy.nodes[index].up = up
            policy.fleet_changed(self.now)
            self._touched.add(gateway)

    # ---------------------------------------------------------------- faults

    def _on_fault(self, fault: Fault) -> None:
        machine = self.machines[fault.node]
        if fault.kind is FaultKind.SLOW:
            machine.factor = fault.factor
            if fault.until < float("inf"):
                self._push(fault.until, Kind.NOTICED, _Healed(fault.node))
            return
        lost = self.take_down(fault.node, empty=fault.kind is FaultKind.LOST)
        self._unnoticed[fault.node] = lost
        notice = self.now + self.options.notice_seconds
        self._push(notice, Kind.NOTICED, _Noticed(fault.node, lost))
        if fault.until < float("inf"):
            self._push(max(fault.until, notice), Kind.NOTICED, _Healed(fault.node))

    def _on_noticed(self, news: _Noticed | _Healed) -> None:
        machine = self.machines[news.node]
        if isinstance(news, _Healed):
            machine.factor = 1.0
            machine.up = True
        self._show(machine)
        for gateway, policy in enumerate(self.policies):
            policy.nodes[news.node].up = machine.up
            policy.nodes[news.node].loading.clear()
            policy.fleet_changed(self.now)
            self._touched.add(gateway)
        if isinstance(news, _Noticed):
            self._unnoticed.pop(news.node, None)
            for work in news.lost:
                work.ended = True
                for waiter in self._waiting_for.pop(id(work), ()):
                    self._release(waiter)
                self.policies[self._owner.pop(id(work))].lost(work, self.now)


@dataclass(frozen=True, slots=True)
class _Noticed:
    node: int
    lost: list[Work]


@dataclass(frozen=True, slots=True)
class _Healed:
    node: int


def _only_gateway(job: Job) -> int:
    return 0
