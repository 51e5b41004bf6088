# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Monolithic serving, the baselines: a request is one piece of work, its whole pipeline one model.

`Partitioned` is Diffusers with a static share of the nodes for each workflow (equal: `diffusers`;
by load, as Shepherd groups: `shepherd`). `Swapping` runs any workflow on any node and swaps whole
pipelines (`clockwork`, as in the DiFlow artifact); where it is `aware` it prefers nodes that hold
the pipeline, swaps only when the deadline survives, and drops what cannot finish.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Mapping, Sequence

from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.pipelines import Job, Pipeline
from kubediffusion.scheduling.policy import Action, Call, Finish, Node, Shed, Start, Work


def equal_partition(pipelines: Sequence[Pipeline], nodes: int) -> list[int]:
    """Nodes of each workflow; the first ones get what is left over."""
    each, rest = divmod(nodes, len(pipelines))
    return [each + (i < rest) for i in range(len(pipelines))]


def load_partition(loads: Sequence[float], nodes: int) -> list[int]:
    """At least one each, as far as they go; the others by load (largest load a node first)."""
    heaviest = sorted(range(len(loads)), key=lambda i: -loads[i])[:nodes]
    shares = [int(i in heaviest) for i in range(len(loads))]
    for _ in range(nodes - len(loads)):
        most = max(range(len(loads)), key=lambda i: loads[i] / shares[i])
        shares[most] += 1
    return shares


class _Monolith(ABC):
    """What the baselines share: one work a request, results when it ends."""

    def __init__(self, nodes: Sequence[Node], costs: Costs) -> None:
        self.nodes = nodes
        self.costs = costs
        self._idle = {node.index for node in nodes if node.up}
        self._gone = set[int]()
        self._out: list[Action] = []

    def ended(self, work: Work, now: float) -> None:
        if self.nodes[work.node].up:
            self._idle.add(work.node)
        self._out.append(Finish(work.jobs[0]))

    def lost(self, work: Work, now: float) -> None:
        """A monolith has nothing to go on from: the request begins again."""
        self._again(work.jobs[0])

    def fleet_changed(self, now: float) -> None:
        down = {node.index for node in self.nodes if not node.up}
        self._idle = (self._idle | (self._gone - down)) - down
        self._gone = down

    def wake_at(self, now: float) -> float | None:
        return None

    @abstractmethod
    def _again(self, job: Job) -> None:
        """It waits again."""

    def _start(self, job: Job, node: int) -> Start:
        self._idle.discard(node)
        name = job.pipeline.name
        call = Call(name, 1, job.solo)
        return Start(Work(node, (job,), (call,), (name,)))

    def _flush(self) -> list[Action]:
        out, self._out = self._out, []
        return out


class Partitioned(_Monolith):
    """``shares[i]`` nodes for ``pipelines[i]``, first come, first served; a request past its
    deadline is dropped when its turn comes."""

    def __init__(
        self,
        nodes: Sequence[Node],
        costs: Costs,
        pipelines: Sequence[Pipeline],
        shares: Sequence[int],
    ) -> None:
        super().__init__(nodes, costs)
        self._queues = [deque[Job]() for _ in pipelines]
        self._group = {pipeline.name: i for i, pipeline in enumerate(pipelines)}
        self._members: list[range] = []
        first = 0
        for share in shares:
            self._members.append(range(first, first + share))
            first += share

    def plan(self) -> dict[int, tuple[str, ...]]:
        """The pipeline that each node keeps."""
        return {
            node: (name,) for name, group in self._group.items() for node in self._members[group]
        }

    def arrived(self, job: Job, now: float) -> None:
        group = self._group[job.pipeline.name]
        if self._members[group]:
            self._queues[group].append(job)
        else:
            self._out.append(Shed(job))

    def _again(self, job: Job) -> None:
        self._queues[self._group[job.pipeline.name]].appendleft(job)

    def decide(self, now: float) -> Sequence[Action]:
        for members, queue in zip(self._members, self._queues, strict=True):
            if not queue:
                continue
            for node in members:
                if node in self._idle:
                    while queue and queue[0].deadline < now:
                        self._out.append(Shed(queue.popleft()))
                    if not queue:
                        break
                    self._out.append(self._start(queue.popleft(), node))
        return self._flush()


class Swapping(_Monolith):
    """Any workflow on any node. See the module's text for what `aware` adds."""

    def __init__(self, nodes: Sequence[Node], costs: Costs, *, aware: bool) -> None:
        super().__init__(nodes, costs)
        self._aware = aware
        self._queue: deque[Job] = deque()
        # Pipelines of each node, least recently used first: what the swapping node does itself.
        self._held: list[dict[str, float]] = [dict(node.resident) for node in nodes]
        self._free_at = [0.0] * len(nodes)

    def arrived(self, job: Job, now: float) -> None:
        self._queue.append(job)

    def _again(self, job: Job) -> None:
        self._queue.appendleft(job)

    def fleet_changed(self, now: float) -> None:
        super().fleet_changed(now)
        for node in self.nodes:
            self._held[node.index] = dict(node.resident)

    def wake_at(self, now: float) -> float | None:
        """When the next one that waits becomes late."""
        late = (job.deadline - job.solo for job in self._queue) if self._aware else iter(())
        return min((moment + 1e-6 for moment in late if moment >= now), default=None)

    def decide(self, now: float) -> Sequence[Action]:
        if self._aware:
            self._decide_aware(now)
        else:
            while self._queue and self._idle:
                job = self._queue.popleft()
                if job.deadline < now:
                    self._out.append(Shed(job))
                else:
                    self._run(job, min(self._idle), now)
        return self._flush()

    def _decide_aware(self, now: float) -> None:
        waiting = deque[Job]()
        for job in self._queue:
            if now + job.solo > job.deadline:
                self._out.append(Shed(job))
                continue
            node = self._choose(job, now) if self._idle else None
            if node is None:
                waiting.append(job)
            else:
                self._run(job, node, now)
        self._queue = waiting

    def _choose(self, job: Job, now: float) -> int | None:
        """An idle node with the pipeline; else the one whose swap hurts least, where time allows
        it and no node with the pipeline is free sooner than the swap would take."""
        name = job.pipeline.name
        holding = [node.index for node in self.nodes if node.up and name in self._held[node.index]]
        idle = [node for node in holding if node in self._idle]
        if idle:
            return min(idle)
        loaded = now + self.costs.load(name)
        if loaded + job.solo > job.deadline:
            return None
        if any(self._free_at[node] <= loaded for node in holding):
            return None
        need = self.costs.models[name].nbytes
        copies = Counter(held for node in self._held for held in node)

        def regret(node: int) -> tuple[int, float, int]:
            """Of what would go, the rarest counts: the only copy is the worst to lose."""
            free = self.nodes[node].memory - sum(self._held[node].values())
            worst = 0
            for held, nbytes in self._held[node].items():
                if free >= need:
                    break
                free += nbytes
                worst = max(worst, len(self.nodes) - copies[held])
            return (worst, sum(self._held[node].values()), node)

        return min(self._idle, key=regret)

    def _run(self, job: Job, node: int, now: float) -> None:
        name, held = job.pipeline.name, self._held[node]
        nbytes = held.pop(name, None)
        if nbytes is None:
            nbytes = self.costs.models[name].nbytes
            while held and sum(held.values()) + nbytes > self.nodes[node].memory + 1.0:
                del held[next(iter(held))]
            load = self.costs.load(name)
        else:
            load = 0.0
        held[name] = nbytes
        self._free_at[node] = now + load + job.solo
        self._out.append(self._start(job, node))


def pipeline_loads(
    pipelines: Sequence[Pipeline], costs: Costs, mix: Mapping[str, float]
) -> list[float]:
    """Relative work of each workflow: its share of the requests times its solo time."""
    return [mix.get(each.name, 0.0) * each.solo_seconds(costs) for each in pipelines]
