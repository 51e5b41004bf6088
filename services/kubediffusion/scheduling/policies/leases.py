# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Tickets made into a lease: its calls, when it ends, and how long it could be put off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kubediffusion.scheduling.policies.tickets import Lease, LeaseCosts, Part, Ticket, calls_of
from kubediffusion.scheduling.policy import Call, Work

# The rank of a ticket with that latest start.
RankOf = Callable[[Ticket, float], float]


def lease_of(
    costs: LeaseCosts,
    tickets: Sequence[Ticket],
    nodes: Sequence[int],
    hosts: Sequence[int],
    now: float,
    rank_of: RankOf,
    *,
    encode_only: bool,
) -> Work:
    """All that is left of `tickets` on the first of `nodes`; on two, a branch of guidance each.
    The tickets know of it afterwards."""
    node, helpers = nodes[0], tuple(nodes[1:])
    split = bool(helpers)
    calls, parts = calls_of(costs, tickets, split=split, encode_only=encode_only)
    moved = max(costs.moved(ticket, node, hosts[node], hosts) for ticket in tickets)
    jobs = tuple(ticket.job for ticket in tickets)
    work = Work(node, jobs, tuple(calls), setup=costs.dispatch + moved, helpers=helpers)
    lease = Lease(tuple(tickets), parts, now, now + work.seconds, split)
    lease.slack = min(
        ticket.job.deadline - _done_at(ticket, work, parts, now) for ticket in tickets
    )
    lease.spent = [_solo_seconds(ticket, calls, parts) for ticket in tickets]
    work.info = lease
    for ticket in tickets:
        ticket.work = work
        ticket.begun = ticket.begun or not encode_only
    lease.rank = min(rank_of(ticket, lease.slack) for ticket in tickets)
    return work


def _done_at(ticket: Ticket, work: Work, parts: Sequence[Part], now: float) -> float:
    """When the ticket is done if what this work leaves of it follows at once."""
    at = now + work.setup
    left_steps, decoded = ticket.steps, not ticket.decode
    for call, part in zip(work.calls, parts, strict=True):
        at += call.count * call.seconds
        if ticket in part.tickets:
            if part.kind == "step":
                left_steps -= call.count
            elif part.kind == "decode":
                decoded = True
                break
    rest = left_steps * ticket.shape.step + (0.0 if decoded else ticket.shape.decode)
    if ticket.encode and not any(p.kind == "encode" and ticket in p.tickets for p in parts):
        rest += ticket.shape.encode
    return at + rest


def _solo_seconds(ticket: Ticket, calls: Sequence[Call], parts: Sequence[Part]) -> float:
    """What of a ticket's own work, as if alone, these calls do."""
    shape, seconds = ticket.shape, 0.0
    for call, part in zip(calls, parts, strict=True):
        if ticket in part.tickets:
            each = {"encode": shape.encode, "step": shape.step, "decode": shape.decode}[part.kind]
            seconds += call.count * each
    return seconds
