# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Our policy: leases on planned nodes, by slack, without spending anything on the doomed.

A round, whenever something happened:

1. **Shed** whoever has to go so that the others can be on time (`feasibility`), and who cannot be
   on time any more.
2. **Place** waiting requests on idle nodes that hold their models, the latest start first; on the
   node that others seek least. A lease is all that is left of a request, as far as the node can.
3. **Revoke**, at its next step, a lease that can wait for one that cannot.
4. **Batch** requests of one denoiser where the profile gains by it and both still end on time; only
   while others wait.
5. **Split** the branches of guidance over two nodes where nobody waits.
6. **Load** what the plan wants, one node at a time (`planner`); no request ever causes a load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.pipelines import Job, Pipeline
from kubediffusion.scheduling.policies import giving_way
from kubediffusion.scheduling.policies.batching import Batching
from kubediffusion.scheduling.policies.feasibility import Claims, Ledger
from kubediffusion.scheduling.policies.fleet import Board
from kubediffusion.scheduling.policies.leases import lease_of
from kubediffusion.scheduling.policies.parameters import Parameters
from kubediffusion.scheduling.policies.planner import Planner
from kubediffusion.scheduling.policies.tickets import Lease, LeaseCosts, Ticket
from kubediffusion.scheduling.policies.waiting import Waiting
from kubediffusion.scheduling.policy import (
    Action,
    Finish,
    Load,
    Node,
    Revoke,
    Shed,
    Start,
    Work,
)

__all__ = ["KubeDiffusion", "Parameters"]

# Requests that one round sheds so that others can be on time, at most.
_SHED_AT_ONCE = 8


class KubeDiffusion:
    def __init__(
        self,
        nodes: Sequence[Node],
        costs: Costs,
        pipelines: Sequence[Pipeline],
        parameters: Parameters | None = None,
        planner: Planner | None = None,
    ) -> None:
        """Without a `planner` nodes keep what they have."""
        self.nodes = nodes
        self.planner = planner
        self.parameters = p = parameters or Parameters()
        self.costs = LeaseCosts(costs, p.dispatch, p.sampler)
        self.board = Board(nodes, pipelines, self.costs, p.batch)
        self.ledger = Ledger(len(self.board.families), p.floor)
        self.waiting = Waiting(self.board, p)
        self._claims = Claims(len(self.board.keys), self.ledger, p.optimism)
        self._batching = Batching(self.costs, self.board, self.waiting, p)
        # Something came or went since the last test of feasibility; and whether that test failed.
        self._fresh = False
        self._pressed = False
        self._out: list[Action] = []

    # ---------------------------------------------------------------- what happened

    def arrived(self, job: Job, now: float) -> None:
        shape = self.board.shapes[job.pipeline.name]
        ticket = Ticket(job, shape, encode=not job.encoded, steps=job.steps_left)
        ticket.begun = ticket.steps < job.pipeline.steps
        self._claims.open(ticket)
        self.ledger.came[shape.family] += 1
        self._wait(ticket)
        self._fresh = True
        if self.planner is not None:
            self.planner.arrived(job, now)

    def ended(self, work: Work, now: float) -> None:
        self.board.release(work)
        self._fresh = self._fresh or self._pressed
        lease: Lease = work.info
        for part, done in zip(lease.parts, work.done, strict=True):
            self._credit(part.kind, part.tickets, done, work.node)
        for ticket in lease.tickets:
            ticket.work = None
            if ticket.encode or ticket.steps or ticket.decode:
                self._wait(ticket)
            else:
                self._close(ticket, now)

    def lost(self, work: Work, now: float) -> None:
        self.ended(work, now)

    def fleet_changed(self, now: float) -> None:
        self.board.refresh()
        self._fresh = True

    def shares(self, shared: bool, now: float) -> None:
        self.parameters = replace(self.parameters, shared=shared)
        self.fleet_changed(now)

    def withdrawn(self, job: Job, now: float) -> None:
        ticket = self._claims.ticket_of(job.id)
        if ticket is not None:
            self.waiting.take(ticket)
            self._claims.close(ticket)

    def learnt(self, costs: Costs, pipelines: Sequence[Pipeline], now: float) -> None:
        """Sets of models get other numbers, so everything that goes by them is made anew."""
        p, tickets = self.parameters, self._claims.tickets()
        self.costs = LeaseCosts(costs, p.dispatch, p.sampler)
        self.board.learn(pipelines, self.costs)
        self.ledger.grow(len(self.board.families))
        self.waiting = Waiting(self.board, p)
        self._batching = Batching(self.costs, self.board, self.waiting, p)
        self._claims.restart(len(self.board.keys))
        for ticket in tickets:
            ticket.shape = self.board.shapes[ticket.job.pipeline.name]
            self._claims.open(ticket)
        self.fleet_changed(now)
        for ticket in tickets:
            if ticket.work is None:
                self._wait(ticket)
        for work in self.board.running.leases():
            self._claims.runs(work)

    def wake_at(self, now: float) -> float | None:
        """The next look at the plan, the next request to become late, the next node to be free."""
        moments = [head.lst for head in self.waiting.heads()]
        if self.planner is not None:
            moments.append(self.planner.wake_at(now))
        if self.parameters.shared and self.waiting:
            moments += [node.foreign_until for node in self.nodes]
        return min((moment + 1e-5 for moment in moments if moment >= now), default=None)

    def _credit(self, kind: str, tickets: Sequence[Ticket], done: int, node: int) -> None:
        for ticket in tickets:
            if kind == "step":
                ticket.steps -= done
            elif done and kind == "encode":
                ticket.encode = False
            elif done:
                ticket.decode = False
            if done:
                ticket.at = node

    def _close(self, ticket: Ticket, now: float) -> None:
        self._claims.close(ticket)
        self._claims.tenants.serve(ticket.job.tenant, ticket.shape.whole, now)
        if now > ticket.job.deadline:
            self.ledger.lost[ticket.shape.family] += 1
        self._out.append(Finish(ticket.job))

    def _wait(self, ticket: Ticket) -> None:
        self.waiting.put(ticket)
        self._claims.waits(ticket)

    # ---------------------------------------------------------------- a round

    def decide(self, now: float) -> Sequence[Action]:
        if self.parameters.shared:
            self.board.hear_of_others(now)
        if self.parameters.shed:
            if (
                self.parameters.foresee
                and self._fresh
                and self.waiting.count > len(self.board.idle)
            ):
                self._shed_for_others(now)
            self._shed_doomed(now)
        self._fresh = False
        if self.planner is not None:
            self._follow_plan(now, self.planner)
        self._place(now)
        if self.waiting:
            if self.parameters.eager and self.parameters.batch > 1:
                self._rescue(now)
            if self.parameters.preempt:
                for work in giving_way.for_urgent(self.board, self.waiting, self.parameters, now):
                    self._revoke(work)
        elif self.board.idle:
            for work in giving_way.to_spread(self.board, self.parameters, now):
                self._revoke(work)
        out, self._out = self._out, []
        return out

    def _shed_doomed(self, now: float) -> None:
        for key in range(len(self.board.keys)):
            while True:
                head = self.waiting.head(key)
                if head is None or head.lst >= now - 1e-6 or self._saved_by_split(head, now):
                    break
                self._drop(head)

    def _saved_by_split(self, ticket: Ticket, now: float) -> bool:
        shape = ticket.shape
        gain = ticket.steps * (shape.step - shape.split)
        return len(self.board.idle) > 1 and self.parameters.split and ticket.lst + gain > now

    def _drop(self, ticket: Ticket) -> None:
        self.waiting.take(ticket)
        self._claims.close(ticket)
        self.ledger.lost[ticket.shape.family] += 1
        self._out.append(Shed(ticket.job))

    def _shed_for_others(self, now: float) -> None:
        self._pressed = False
        for _ in range(_SHED_AT_ONCE):
            victim = self._claims.first_victim(self.board.holders, now)
            if victim is None:
                return
            self._pressed = True
            if self.parameters.batch > 1 and self._rescue(now):
                return
            self._drop(victim)

    def _rescue(self, now: float) -> bool:
        """Batch a waiting request with a lease, where that gains most, to make room for others.
        True: a lease is on its way to that."""
        if self.board.running.joining:
            return bool(self._batching.wanting())
        work = self._batching.partner(now)
        if work is None:
            return False
        self._revoke(work, joining=True)
        return True

    def _revoke(self, work: Work, *, joining: bool = False) -> None:
        self.board.running.revoke(work, joining=joining)
        self._out.append(Revoke(work))

    # ---------------------------------------------------------------- the plan

    def _follow_plan(self, now: float, planner: Planner) -> None:
        """Load on idle nodes; where none of those that should is idle, free one that can wait."""
        if planner.due(now):
            planner.look(now)
        if not planner.targets:
            return
        loading = sum(1 for node in self.nodes if node.loading)
        for index in list(planner.pending()):
            if loading >= planner.at_most():
                return
            work = self.board.running.works.get(index)
            if index in self.board.idle:
                self._load(planner.next_load(index), now)
            elif work is None:
                continue
            elif not work.info.revoked and work.info.slack > planner.seconds_of(index):
                self._revoke(work)
            else:
                continue
            loading += 1

    def _load(self, load: Load, now: float) -> None:
        node = self.nodes[load.node]
        for model in load.evict:
            node.resident.pop(model, None)
        node.loading[load.model] = now + self.costs.costs.load(load.model)
        self.board.refresh()
        self._out.append(load)

    # ---------------------------------------------------------------- placing

    def _place(self, now: float) -> None:
        board = self.board
        blocked: set[int] = set()
        while board.idle:
            best: Ticket | None = None
            for head in self.waiting.heads():
                if head.waits not in blocked and (best is None or head.rank < best.rank):
                    best = head
            if best is None:
                return
            able = self._able(best.waits, encode=best.encode)
            if not able:
                blocked.add(best.waits)
                continue
            self.waiting.take(best)
            self._lease(best, self._node_for(best, able), now)

    def _able(self, key: int, *, encode: bool) -> set[int]:
        """Idle nodes that hold those models. Another gateway cannot revoke a lease of ours, so
        where nodes are shared, those with scarce encoders only encode."""
        board, holders = self.board, self.board.holders[key]
        if self.parameters.shared and not encode and not holders <= board.scarce:
            return (board.idle & holders) - board.scarce
        return board.idle & holders

    def _node_for(self, ticket: Ticket, able: set[int]) -> int:
        sought, at = self.board.sought, ticket.at
        return min(able, key=lambda node: (sought[node], node != at, node))

    def _lease(self, ticket: Ticket, node: int, now: float) -> None:
        board, shape = self.board, ticket.shape
        encode_only = ticket.encode and (
            board.apart[shape.index] or shape.denoise_key not in board.can[node]
        )
        tickets, nodes = [ticket], [node]
        if not encode_only:
            spare = self._able(shape.denoise_key, encode=False) - {node}
            if self.waiting and len(board.idle) == 1 and (self._pressed or self.parameters.eager):
                self._batching.fill(tickets, node, now)
            elif spare and not self.waiting and self._worth_splitting(ticket):
                if ticket.encode:
                    encode_only = True
                elif ticket.steps:
                    nodes.append(self._helper(node, spare))
        work = lease_of(
            self.costs, tickets, nodes, board.hosts, now, self.waiting.rank, encode_only=encode_only
        )
        board.occupy(work)
        self._claims.runs(work)
        self._out.append(Start(work))

    def _helper(self, node: int, spare: set[int]) -> int:
        """On the same host where there is one; one that others seek little."""
        hosts, sought = self.board.hosts, self.board.sought
        return min(spare, key=lambda each: (hosts[each] != hosts[node], sought[each], each))

    def _worth_splitting(self, ticket: Ticket) -> bool:
        shape, p = ticket.shape, self.parameters
        return p.split and ticket.steps * (shape.step - shape.split) > p.split_least * 0.2
