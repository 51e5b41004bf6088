# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The leases under way, in the orders in which a round asks for them.

A fleet of hundreds has as many leases, and a round that looks at each of them takes milliseconds;
what it asks (does one give way already, which has the least urgent rank, which could take another
request in) is kept as leases come and go.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence

from kubediffusion.scheduling.policies.tickets import Lease
from kubediffusion.scheduling.policy import Work

# By slack, the most first; then by age.
Joinable = tuple[float, int, Work]


class Running:
    """`batch` is the most requests that a lease may have."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._serial = 0
        # By node, helpers too.
        self.works: dict[int, Work] = {}
        # Leases that were revoked and have not ended; those of them that a request waits to join;
        # and those that are split, revoked or not.
        self.yielding = 0
        self.joining = 0
        self.split = 0
        self._ranks: list[tuple[float, int, Lease]] = []
        self._joinable: defaultdict[str, list[Joinable]] = defaultdict(list)

    def add(self, work: Work) -> None:
        for node in (work.node, *work.helpers):
            self.works[node] = work
        lease: Lease = work.info
        self._serial += 1
        lease.serial = self._serial
        self.split += lease.split
        heapq.heappush(self._ranks, (-lease.rank, lease.serial, lease))
        if self._can_be_joined(lease):
            insort(self._joinable[_denoiser(lease)], (-lease.slack, lease.serial, work))

    def remove(self, work: Work) -> None:
        for node in (work.node, *work.helpers):
            if self.works.get(node) is work:
                del self.works[node]
        lease: Lease = work.info
        self.split -= lease.split
        if lease.revoked:
            self.yielding -= 1
            self.joining -= lease.joining
        else:
            self._close(lease)
        lease.over = True

    def revoke(self, work: Work, *, joining: bool = False) -> None:
        """It ends at its next boundary; `joining`: for a request that goes on together with it."""
        lease: Lease = work.info
        self._close(lease)
        lease.revoked, lease.joining = True, joining
        self.yielding += 1
        self.joining += joining

    def highest_rank(self) -> float:
        """Of those that have not been revoked: the rank of the least urgent; -inf of none."""
        ranks = self._ranks
        while ranks and (ranks[0][2].over or ranks[0][2].revoked):
            heapq.heappop(ranks)
        return -ranks[0][0] if ranks else float("-inf")

    def joinable(self, denoiser: str) -> Sequence[Joinable]:
        """Leases of that denoiser that could take one more request in, the most slack first."""
        return self._joinable.get(denoiser, ())

    def leases(self) -> Iterator[Work]:
        """Each once, in the order in which their nodes were taken."""
        return (work for node, work in self.works.items() if work.node == node)

    def _can_be_joined(self, lease: Lease) -> bool:
        return not lease.split and len(lease.tickets) < self._batch

    def _close(self, lease: Lease) -> None:
        if self._can_be_joined(lease):
            entries = self._joinable[_denoiser(lease)]
            # (slack, serial) is less than any tuple that goes on with a work.
            del entries[bisect_left(entries, (-lease.slack, lease.serial))]  # pyright: ignore


def _denoiser(lease: Lease) -> str:
    return lease.tickets[0].shape.pipeline.denoiser
