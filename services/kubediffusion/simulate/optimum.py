# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The most requests that could be on time, by search: what a policy's choices cost.

The model is an abstraction, and exact in itself. Every GPU holds every model. A request is so many
GPU seconds, from its arrival on; it may be stopped and moved at any moment at no cost, and use as
many GPUs at once as it has forwards side by side. Requests are not batched. All arrivals are known.

Whether a set of requests can all be on time is then a flow (Horn, 1974): between two neighbouring
arrivals or deadlines, of length l, a request takes at most `width` l and all together at most
`gpus` l. Which set, is found by branch and bound; for a dozen requests that is exact and quick.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Flows are of whole nanoseconds, so that a sum is a sum.
_TICKS = 1e9
_PLENTY = 1 << 62


@dataclass(frozen=True, slots=True)
class Demand:
    """`seconds` of GPU time between `arrival` and `deadline`, on `width` GPUs at once at most."""

    arrival: float
    deadline: float
    seconds: float
    width: int = 2


def most_on_time(demands: Sequence[Demand], gpus: int) -> int:
    """How many of them can be on time, knowing all in advance."""
    return len(best_set(demands, gpus))


def best_set(demands: Sequence[Demand], gpus: int) -> tuple[int, ...]:
    """Indices of the largest set that can be on time; one of them, where there are several."""
    # The shortest first: a large set is found early, and bounds the rest of the search.
    order = sorted(range(len(demands)), key=lambda i: demands[i].seconds)
    best: tuple[int, ...] = ()

    def search(at: int, taken: tuple[int, ...]) -> None:
        nonlocal best
        if len(taken) > len(best):
            best = taken
        if at == len(order) or len(taken) + len(order) - at <= len(best):
            return
        more = (*taken, order[at])
        if feasible([demands[i] for i in more], gpus):
            search(at + 1, more)
        search(at + 1, taken)

    search(0, ())
    return tuple(sorted(best))


def feasible(demands: Sequence[Demand], gpus: int) -> bool:
    """Whether all of them can be on time."""
    windows = [(round(each.arrival * _TICKS), round(each.deadline * _TICKS)) for each in demands]
    work = [round(each.seconds * _TICKS) for each in demands]
    moments = sorted({moment for window in windows for moment in window})
    slots = list(pairwise(moments))
    source, sink = len(demands) + len(slots), len(demands) + len(slots) + 1
    flow = _Flow(sink + 1)
    for slot, (left, right) in enumerate(slots, len(demands)):
        flow.edge(slot, sink, gpus * (right - left))
    for i, (begin, end) in enumerate(windows):
        flow.edge(source, i, work[i])
        for slot, (left, right) in enumerate(slots, len(demands)):
            if begin <= left and right <= end:
                flow.edge(i, slot, min(demands[i].width, gpus) * (right - left))
    return flow.most(source, sink) == sum(work)


class _Flow:
    """Dinic's algorithm; edge i and its reverse are i and i ^ 1."""

    def __init__(self, nodes: int) -> None:
        self._out: list[list[int]] = [[] for _ in range(nodes)]
        self._to: list[int] = []
        self._room: list[int] = []
        self._level: list[int] = []
        self._next: list[int] = []

    def edge(self, begin: int, end: int, capacity: int) -> None:
        for at, to, room in ((begin, end, capacity), (end, begin, 0)):
            self._out[at].append(len(self._to))
            self._to.append(to)
            self._room.append(room)

    def most(self, source: int, sink: int) -> int:
        total = 0
        while self._reaches(source, sink):
            self._next = [0] * len(self._out)
            while pushed := self._push(source, sink, _PLENTY):
                total += pushed
        return total

    def _reaches(self, source: int, sink: int) -> bool:
        self._level = [-1] * len(self._out)
        self._level[source] = 0
        front = deque([source])
        while front:
            at = front.popleft()
            for edge in self._out[at]:
                to = self._to[edge]
                if self._room[edge] and self._level[to] < 0:
                    self._level[to] = self._level[at] + 1
                    front.append(to)
        return self._level[sink] >= 0

    def _push(self, at: int, sink: int, most: int) -> int:
        """Along one path of growing levels, as much as goes through."""
        if at == sink:
            return most
        edges = self._out[at]
        while self._next[at] < len(edges):
            edge = edges[self._next[at]]
            to, room = self._to[edge], self._room[edge]
            if room and self._level[to] == self._level[at] + 1:
                pushed = self._push(to, sink, min(most, room))
                if pushed:
                    self._room[edge] -= pushed
                    self._room[edge ^ 1] += pushed
                    return pushed
            self._next[at] += 1
        return 0
