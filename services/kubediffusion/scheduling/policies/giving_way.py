# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which leases end early: for a request that can wait less, or to go on over two nodes."""

from __future__ import annotations

from collections.abc import Iterator

from kubediffusion.scheduling.policies.fleet import Board
from kubediffusion.scheduling.policies.parameters import Parameters
from kubediffusion.scheduling.policies.tickets import Lease, Ticket
from kubediffusion.scheduling.policies.waiting import FIRST, Waiting
from kubediffusion.scheduling.policy import Work

# Whoever goes before all denoising has a rank below this.
_ENCODES_FIRST = -FIRST / 10


def for_urgent(
    board: Board, waiting: Waiting, parameters: Parameters, now: float
) -> Iterator[Work]:
    """For each head that has less time than a lease on its nodes, that lease. Revoke each before
    the next one is asked for."""
    running = board.running
    share = parameters.laxity_share
    coming, split, highest = running.yielding, running.split > 0, running.highest_rank()
    for head in sorted(waiting.heads(), key=lambda ticket: ticket.rank):
        if coming > 0:
            coming -= 1
            continue
        if not split and head.rank + parameters.hysteresis >= highest + share * now:
            return  # nor does any that is less urgent
        work = _victim(head, board, parameters, now)
        if work is not None:
            yield work


def _victim(head: Ticket, board: Board, parameters: Parameters, now: float) -> Work | None:
    """The lease with the most slack on the nodes that `head` can use; a split one first."""
    best: Work | None = None
    most = head.rank + parameters.hysteresis
    share = parameters.laxity_share
    for node in board.holders[head.waits]:
        work = board.running.works.get(node)
        if work is None:
            continue
        lease: Lease = work.info
        if lease.revoked or lease.end - now < parameters.split_least:
            continue
        if lease.split:
            return work
        if most < _ENCODES_FIRST and lease.slack < 2 * head.shape.encode:
            continue
        rank = lease.rank + share * now
        if rank > most:
            most, best = rank, work
    return best


def to_spread(board: Board, parameters: Parameters, now: float) -> Iterator[Work]:
    """Nobody waits and nodes are idle: the longest leases, to go on over two nodes each."""
    running = board.running
    spare = set(board.idle)
    count = len(spare) - running.yielding
    if count <= 0:
        return
    leases = sorted(running.leases(), key=lambda work: (len(work.jobs) == 1, work.info.slack))
    for work in leases:
        lease: Lease = work.info
        if count <= 0:
            return
        if lease.split or lease.revoked:
            continue
        if len(work.jobs) == 1 and not parameters.split:
            return
        shape = lease.tickets[0].shape
        helpers = spare & board.holders[shape.denoise_key]
        least = parameters.split_least + shape.step * 3 + shape.decode
        if helpers and lease.end - now > least:
            yield work
            spare.discard(min(helpers))
            count -= 1
