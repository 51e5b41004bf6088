# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""DiFlow's policy, re-implemented as the baseline to beat (arXiv 2604.08123, sections 3 to 5).

A task for each forward. The head of the ready list, by (arrival, farthest from the sink), goes to
one of the workers that are free within 10 ms; with it go ready tasks of the same operator, up to
the batch of the latency or the throughput table; the worker is that of the least
queue + transfer + load + run. Samplers stay on the worker of the request's first. Requests are
refused at arrival where the work in flight exceeds their slack ("early abort"), never later.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.pipelines import Job, Pipeline
from kubediffusion.scheduling.policies.diflow_graph import Op, unroll
from kubediffusion.scheduling.policy import Action, Call, Finish, Node, Shed, Start, Work

# A worker takes more while what it has is expected to end within so many seconds.
AVAILABLE_WITHIN = 0.010
_EPS = 1e-9


@dataclass(frozen=True, slots=True)
class Tables:
    """Requests a batch in latency and in throughput mode, by model; and the medians in seconds
    that early abort reckons with (a model without one counts as profiled)."""

    batches: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    medians: Mapping[str, float] = field(default_factory=dict[str, float])
    early_abort: bool = True
    # Seconds that a dispatched task takes beside its forward; a sampler's are all it takes.
    dispatch: float = 0.002
    sampler: float = 0.0025


# (arrival, -depth), then the request and the task, so that nothing is left to chance.
Order = tuple[float, int, int, int]
_Entry = tuple[Order, int, "Task"]
_Input = tuple[float, list[int], set[int]]


@dataclass(slots=True, eq=False)
class Task:
    """A task of a request under way. `at`: the workers that hold its output."""

    run: Run
    op: Op
    missing: int
    ready: bool = False
    work: Work | None = None
    done: bool = False
    at: list[int] = field(default_factory=list[int])

    @property
    def lazy(self) -> bool:
        return bool(self.op.lazy)

    @property
    def order(self) -> Order:
        return (self.run.job.arrival, -self.op.depth, self.run.job.id, self.op.index)


@dataclass(slots=True, eq=False)
class Run:
    job: Job
    tasks: list[Task] = field(default_factory=list[Task])
    sampler_at: int | None = None
    open: int = 0
    # Median seconds of what is not done yet.
    left: float = 0.0


def workers_needed(counts: Mapping[str, int], tables: Tables) -> int:
    """Workers that all ready tasks would fill in latency mode."""
    return sum(
        math.ceil(count / tables.batches.get(model, (1, 1))[0])
        for model, count in counts.items()
        if count
    )


def may_group(head: Task, other: Task) -> bool:
    """The same operator and mode, of any request; a task with deferred inputs never."""
    return (
        head.op.model == other.op.model
        and head.op.mode == other.op.mode
        and not head.lazy
        and not other.lazy
    )


def next_power_of_two(batch: int) -> int:
    return 1 << (batch - 1).bit_length()


def overloaded(left: Sequence[float], workers: int, slack: float) -> bool:
    """Early abort: `left` are the median seconds that remain of each request in flight."""
    if workers > len(left):
        return False
    return max(sum(left) / workers, max(left)) > slack


class DiFlow:
    def __init__(
        self,
        nodes: Sequence[Node],
        costs: Costs,
        pipelines: Sequence[Pipeline],
        tables: Tables | None = None,
    ) -> None:
        self.nodes = nodes
        self.costs = costs
        self.tables = tables or Tables()
        self._graphs = {each.name: unroll(each) for each in pipelines}
        self._streams = {each.name: each.sizes.residuals > 2 for each in pipelines}
        self._runs: dict[int, Run] = {}
        self._ready: list[_Entry] = []
        self._by_model: dict[str, list[_Entry]] = {}
        self._counts: dict[str, int] = {}
        self._serial = 0
        self._reserved = [0.0] * len(nodes)
        self._out: list[Action] = []

    # ---------------------------------------------------------------- what happened

    def arrived(self, job: Job, now: float) -> None:
        slack = job.deadline - job.arrival - job.solo
        if self.tables.early_abort and overloaded(
            [run.left for run in self._runs.values()], self._workers(), slack
        ):
            self._out.append(Shed(job))
            return
        self._begin(job)

    def _begin(self, job: Job) -> None:
        run = Run(job)
        for op in self._graphs[job.pipeline.name]:
            run.tasks.append(Task(run, op, len(op.inputs)))
            run.left += self._median(op)
        run.open = len(run.tasks)
        self._runs[job.id] = run
        for task in run.tasks:
            if not task.missing:
                self._enqueue(task)

    def ended(self, work: Work, now: float) -> None:
        tasks: list[Task] = work.info[0]
        self._reserved[work.node] -= work.info[1]
        if self._reserved[work.node] < _EPS:
            self._reserved[work.node] = 0.0
        for task in tasks:
            if not task.done:
                self._complete(task, work.node)

    def _complete(self, task: Task, node: int) -> None:
        run = task.run
        task.done = True
        task.at.append(node)
        run.open -= 1
        run.left -= self._median(task.op)
        if not run.open:
            del self._runs[run.job.id]
            self._out.append(Finish(run.job))
            return
        for index in task.op.successors:
            follower = run.tasks[index]
            if task.op.index in follower.op.lazy:
                continue
            follower.missing -= 1
            if not follower.missing and not follower.ready:
                self._enqueue(follower)

    def lost(self, work: Work, now: float) -> None:
        """DiFlow has no handling of lost workers; the request begins again, as a client would."""
        self._reserved[work.node] = 0.0
        for job in work.jobs:
            run = self._runs.pop(job.id, None)
            if run is None:
                continue
            for task in run.tasks:
                if task.ready and task.work is None and not task.done:
                    self._counts[task.op.model] -= 1
                task.done = True
            self._begin(job)

    def fleet_changed(self, now: float) -> None:
        return

    def wake_at(self, now: float) -> float | None:
        return None

    def _workers(self) -> int:
        return sum(node.up for node in self.nodes)

    def _median(self, op: Op) -> float:
        median = self.tables.medians.get(op.model)
        if median is not None:
            return median
        if op.pinned:
            return self.tables.sampler
        return self._run_seconds(op, 1) + self.tables.dispatch

    def _enqueue(self, task: Task) -> None:
        task.ready = True
        self._serial += 1
        entry = (task.order, self._serial, task)
        heapq.heappush(self._ready, entry)
        heapq.heappush(self._by_model.setdefault(task.op.model, []), entry)
        self._counts[task.op.model] = self._counts.get(task.op.model, 0) + 1

    # ---------------------------------------------------------------- dispatching

    def decide(self, now: float) -> Sequence[Action]:
        available = [node.index for node in self.nodes if node.up and self._available(node.index)]
        while available:
            head = self._pop()
            if head is None:
                break
            group = self._group(head, len(available))
            node = self._dispatch(group, available)
            if node in available and not self._available(node):
                available.remove(node)
        out, self._out = self._out, []
        return out

    def _available(self, node: int) -> bool:
        return self._reserved[node] <= AVAILABLE_WITHIN + _EPS

    def _pop(self) -> Task | None:
        while self._ready:
            _, _, task = heapq.heappop(self._ready)
            if task.work is None and not task.done:
                self._counts[task.op.model] -= 1
                return task
        return None

    def _group(self, head: Task, available: int) -> list[Task]:
        """The head and ready tasks that go with it, in the order of the ready list."""
        latency, throughput = self.tables.batches.get(head.op.model, (1, 1))
        roomy = workers_needed(self._counts, self.tables) <= available
        most = latency if roomy else throughput
        group = [head]
        if head.lazy or head.op.pinned or most == 1:
            return group
        heap, kept = self._by_model[head.op.model], list[_Entry]()
        while heap and len(group) < most:
            entry = heapq.heappop(heap)
            task = entry[2]
            if task is head or task.work is not None or task.done:
                continue
            if may_group(head, task):
                group.append(task)
                self._counts[task.op.model] -= 1
            else:
                kept.append(entry)
        for entry in kept:
            heapq.heappush(heap, entry)
        return group

    def _dispatch(self, group: list[Task], available: Sequence[int]) -> int:
        """Starts the group, and returns where."""
        head = group[0]
        run = head.run
        node, parts = self._place(group, available)
        transfer, load, seconds = parts
        if head.op.pinned and run.sampler_at is None:
            run.sampler_at = node
        overhead = self.tables.sampler if head.op.pinned else self.tables.dispatch
        call = Call(head.op.model, 1, 0.0 if head.op.pinned else seconds, len(group))
        work = Work(
            node,
            tuple(dict.fromkeys(task.run.job for task in group)),
            (call,),
            models=() if head.op.pinned or not self._heavy(head.op) else (head.op.model,),
            setup=overhead + transfer,
        )
        reserve = transfer + load + seconds
        work.info = (group, reserve)
        self._defer(head, work, seconds)
        self._reserved[node] += reserve
        for task in group:
            task.work = work
        self._out.append(Start(work))
        return node

    def _defer(self, task: Task, work: Work, seconds: float) -> None:
        """The denoiser may start, and ends after its ControlNet: by what is left to do when the
        last residual is there (all of it where they come together, as in Flux)."""
        for index in task.op.lazy:
            producer = task.run.tasks[index]
            if not producer.done and producer.work is not None:
                work.after = producer.work
                residuals = max(1, task.run.job.pipeline.sizes.residuals)
                streams = self._streams[task.run.job.pipeline.name]
                work.tail = seconds / residuals if streams else seconds

    def _place(
        self, group: Sequence[Task], available: Sequence[int]
    ) -> tuple[int, tuple[float, float, float]]:
        """The worker of the least cost, and its transfer, load and run seconds."""
        head = group[0]
        inputs = self._inputs(group)
        pinned = head.run.sampler_at if head.op.pinned else None
        if pinned is not None and self.nodes[pinned].up:
            return pinned, (self._transfer(inputs, pinned), 0.0, 0.0)
        seconds = 0.0 if head.op.pinned else self._run_seconds(head.op, len(group))
        best: tuple[float, int, tuple[float, float, float]] | None = None
        for node in available:
            transfer = self._transfer(inputs, node)
            load = self._load(head.op, node)
            cost = self._reserved[node] + transfer + load + seconds
            if best is None or cost < best[0] - _EPS:
                best = (cost, node, (transfer, load, seconds))
        assert best is not None
        return best[1], best[2]

    def _inputs(self, group: Sequence[Task]) -> list[_Input]:
        """What has to be where the group runs: bytes, the nodes that have it, and their hosts."""
        out: list[_Input] = []
        for task in group:
            tasks = task.run.tasks
            for index, nbytes in task.op.inputs:
                at = tasks[index].at
                if nbytes and at:
                    out.append((nbytes, at, {self.nodes[each].host for each in at}))
        return out

    def _transfer(self, inputs: Sequence[_Input], node: int) -> float:
        """Summed over inputs; a source on the same host before the first one."""
        host, seconds = self.nodes[node].host, 0.0
        for nbytes, at, hosts in inputs:
            if node not in at:
                seconds += self.costs.transfer(nbytes, host in hosts)
        return seconds

    def _heavy(self, op: Op) -> bool:
        costs = self.costs.models.get(op.model)
        return costs is not None and costs.nbytes > 0

    def _load(self, op: Op, node: int) -> float:
        if op.pinned or op.model in self.nodes[node].resident or not self._heavy(op):
            return 0.0
        return self.costs.load(op.model)

    def _run_seconds(self, op: Op, batch: int) -> float:
        return self.costs.run(op.model, next_power_of_two(batch), op.mode)
