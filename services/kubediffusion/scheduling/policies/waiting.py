# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Requests that wait for a node: who is the most urgent among those that need the same models."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from kubediffusion.scheduling.policies.fleet import Board
from kubediffusion.scheduling.policies.parameters import Parameters
from kubediffusion.scheduling.policies.tickets import Ticket

# Encoding, where few nodes can do it, goes before all denoising: it is short, and others wait.
FIRST = 1e5


class Waiting:
    """A heap for each set of models that a request may need next. Those that left are forgotten
    when they come to the top."""

    def __init__(self, board: Board, parameters: Parameters) -> None:
        self._board = board
        self._parameters = parameters
        self._heaps: list[list[tuple[float, int, Ticket]]] = [[] for _ in board.keys]
        self.count = 0

    def __bool__(self) -> bool:
        return self.count > 0

    def put(self, ticket: Ticket) -> None:
        job = ticket.job
        ticket.lst = job.deadline - ticket.left - self._parameters.dispatch
        ticket.rank = self.rank(ticket, ticket.lst)
        ticket.waits = ticket.key
        self.count += 1
        heapq.heappush(self._heaps[ticket.key], (ticket.rank, job.id, ticket))

    def take(self, ticket: Ticket) -> None:
        ticket.waits = -1
        self.count -= 1

    def rank(self, ticket: Ticket, lst: float) -> float:
        """Who goes first; what was begun goes before what was not, other things nearly equal."""
        job, p = ticket.job, self._parameters
        key = (
            job.arrival if p.order == "arrival" else p.laxity * lst + (1 - p.laxity) * job.deadline
        )
        head_start = min(p.begun * job.solo, p.begun_most) if ticket.begun else 0.0
        if ticket.encode and self._board.apart[ticket.shape.index]:
            head_start = FIRST
        return key - head_start - 1e6 * job.priority

    def head(self, key: int) -> Ticket | None:
        heap = self._heaps[key]
        while heap and (heap[0][2].waits != key or heap[0][2].rank != heap[0][0]):
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def heads(self) -> Iterator[Ticket]:
        """The most urgent of each heap."""
        for key, heap in enumerate(self._heaps):
            if heap:
                head = self.head(key)
                if head is not None:
                    yield head
