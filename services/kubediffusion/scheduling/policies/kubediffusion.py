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

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.pipelines import Job, Pipeline
from kubediffusion.scheduling.policies.feasibility import Claim, Ledger, first_victim
from kubediffusion.scheduling.policies.fleet import Board
from kubediffusion.scheduling.policies.planner import Planner
from kubediffusion.scheduling.policies.tickets import (
    Lease,
    LeaseCosts,
    Part,
    Shape,
    Ticket,
    calls_of,
)
from kubediffusion.scheduling.policy import (
    Action,
    Call,
    Finish,
    Load,
    Node,
    Revoke,
    Shed,
    Start,
    Work,
)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Seconds unless said otherwise. ``dispatch`` is a lease's overhead and ``sampler`` a step's;
    ``floor`` is the attainment that no family is pushed under while another can give (0: the most
    requests, whosever they are); ``order`` is "slack" or "arrival"; slack is from the deadline
    (``laxity`` 0) or from the latest start (1)."""

    dispatch: float = 0.002
    sampler: float = 0.0002
    order: str = "slack"
    laxity: float = 0.25
    floor: float = 0.0
    shed: bool = True
    foresee: bool = True
    optimism: float = 0.95
    grace: float = 0.0
    batch: int = 3
    least_gain: float = 0.04
    # Batch with a running lease once this share of a waiting request's slack would be lost.
    pressure: float = 0.5
    # What was begun goes before what was not, by this share of its solo time.
    begun: float = 0.25
    begun_most: float = 0.25
    margin: float = 0.01
    least_slack: float = 0.1
    split: bool = True
    split_least: float = 0.3
    preempt: bool = True
    # Other gateways have work on the same nodes.
    shared: bool = False
    hysteresis: float = 0.2
    eager: bool = True


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
        self.parameters = parameters or Parameters()
        self.costs = LeaseCosts(costs, self.parameters.dispatch, self.parameters.sampler)
        self.board = Board(nodes, pipelines, self.costs)
        self.ledger = Ledger(len(self.board.families), self.parameters.floor)
        self._heaps: list[list[tuple[float, int, Ticket]]] = [[] for _ in self.board.keys]
        self._tickets: dict[int, Ticket] = {}
        self._waiting = 0
        self._fresh = False
        self._pressed = False
        self._out: list[Action] = []
        # By pipeline: whether a batch of two requests saves enough.
        self._gains: dict[int, bool] = {}

    # ---------------------------------------------------------------- what happened

    def arrived(self, job: Job, now: float) -> None:
        shape = self.board.shapes[job.pipeline.name]
        ticket = Ticket(job, shape, encode=not job.encoded, steps=job.steps_left)
        ticket.begun = ticket.steps < job.pipeline.steps
        self._tickets[job.id] = ticket
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
        ticket = self._tickets.pop(job.id, None)
        if ticket is not None:
            ticket.over = True
            self._take(ticket)

    def learnt(self, costs: Costs, pipelines: Sequence[Pipeline], now: float) -> None:
        self.costs = LeaseCosts(costs, self.parameters.dispatch, self.parameters.sampler)
        self.board.learn(pipelines, self.costs)
        self.ledger.grow(len(self.board.families))
        self._gains.clear()
        self._heaps = [[] for _ in self.board.keys]
        for ticket in self._tickets.values():
            ticket.shape = self.board.shapes[ticket.job.pipeline.name]
        self.fleet_changed(now)
        for ticket in self._tickets.values():
            if ticket.work is None:
                self._take(ticket)
                self._wait(ticket)

    def wake_at(self, now: float) -> float | None:
        """The next look at the plan, the next request to become late, the next node to be free."""
        moments = [head.lst for head in self._heads()] if self._waiting else []
        if self.planner is not None:
            moments.append(self.planner.wake_at(now))
        if self.parameters.shared and self._waiting:
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
        ticket.over = True
        del self._tickets[ticket.job.id]
        if now > ticket.job.deadline:
            self.ledger.lost[ticket.shape.family] += 1
        self._out.append(Finish(ticket.job))

    # ---------------------------------------------------------------- waiting

    def _wait(self, ticket: Ticket) -> None:
        job = ticket.job
        ticket.lst = job.deadline - ticket.left - self.parameters.dispatch
        ticket.rank = self._rank(ticket, ticket.lst)
        ticket.waits = ticket.key
        self._waiting += 1
        heapq.heappush(self._heaps[ticket.key], (ticket.rank, job.id, ticket))

    def _rank(self, ticket: Ticket, lst: float) -> float:
        """Who goes first; what was begun goes before what was not, other things nearly equal."""
        job, order = ticket.job, self.parameters.order
        share = self.parameters.laxity
        key = job.arrival if order == "arrival" else share * lst + (1.0 - share) * job.deadline
        head_start = (
            min(self.parameters.begun * job.solo, self.parameters.begun_most)
            if ticket.begun
            else 0.0
        )
        if ticket.encode and self.board.apart[ticket.shape.index]:
            head_start = _FIRST
        return key - head_start - 1e6 * job.priority

    def _head(self, key: int) -> Ticket | None:
        heap = self._heaps[key]
        while heap and (heap[0][2].waits != key or heap[0][2].rank != heap[0][0]):
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def _heads(self) -> Iterator[Ticket]:
        for key, heap in enumerate(self._heaps):
            if heap:
                head = self._head(key)
                if head is not None:
                    yield head

    def _take(self, ticket: Ticket) -> None:
        ticket.waits = -1
        self._waiting -= 1

    # ---------------------------------------------------------------- a round

    def decide(self, now: float) -> Sequence[Action]:
        if self.parameters.shared:
            self.board.hear_of_others(now)
        if self.parameters.shed:
            if self.parameters.foresee and self._fresh and self._waiting > len(self.board.idle):
                self._shed_for_others(now)
            self._shed_doomed(now)
        self._fresh = False
        if self.planner is not None:
            self._follow_plan(now, self.planner)
        self._place(now)
        if self._waiting:
            if self.parameters.eager and self.parameters.batch > 1:
                self._rescue(now)
            if self.parameters.preempt:
                self._preempt(now)
        elif self.board.idle:
            self._spread(now)
        out, self._out = self._out, []
        return out

    def _shed_doomed(self, now: float) -> None:
        for key in range(len(self._heaps)):
            while True:
                head = self._head(key) if self._heaps[key] else None
                if head is None or head.lst >= now - 1e-6 or self._saved_by_split(head, now):
                    break
                self._drop(head)

    def _saved_by_split(self, ticket: Ticket, now: float) -> bool:
        shape = ticket.shape
        gain = ticket.steps * (shape.step - shape.split)
        return len(self.board.idle) > 1 and self.parameters.split and ticket.lst + gain > now

    def _drop(self, ticket: Ticket) -> None:
        self._take(ticket)
        ticket.over = True
        del self._tickets[ticket.job.id]
        self.ledger.lost[ticket.shape.family] += 1
        self._out.append(Shed(ticket.job))

    def _shed_for_others(self, now: float) -> None:
        p = self.parameters
        claims = [self._claim(ticket, now) for ticket in self._tickets.values()]
        self._pressed = False
        for _ in range(8):
            victim = first_victim(claims, self.board.holders, now, self.ledger)
            if victim is None:
                return
            self._pressed = True
            if p.batch > 1 and self._rescue(now):
                return
            claims = [claim for claim in claims if claim.ticket is not victim]
            self._drop(victim)

    def _claim(self, ticket: Ticket, now: float) -> Claim:
        left = ticket.left
        if ticket.work is not None:
            lease: Lease = ticket.work.info
            gone = (now - lease.start) / max(lease.end - lease.start, 1e-9)
            left -= min(1.0, gone) * lease.spent[lease.tickets.index(ticket)]
        left *= self.parameters.optimism
        return Claim(ticket, left, ticket.job.deadline - left, ticket.job.deadline)

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
            work = self.board.works.get(index)
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
            for head in self._heads():
                if head.waits not in blocked and (best is None or head.rank < best.rank):
                    best = head
            if best is None:
                return
            able = board.idle & board.holders[best.waits]
            if not able:
                blocked.add(best.waits)
                continue
            self._take(best)
            self._lease(best, self._node_for(best, able), now)

    def _node_for(self, ticket: Ticket, able: set[int]) -> int:
        sought, at = self.board.sought, ticket.at
        return min(able, key=lambda node: (sought[node], node != at, node))

    def _lease(self, ticket: Ticket, node: int, now: float) -> None:
        board = self.board
        can = board.can[node]
        encode_only = ticket.encode and (
            board.apart[ticket.shape.index] or ticket.shape.denoise_key not in can
        )
        tickets = [ticket]
        helper = None
        if not encode_only:
            spare = (board.idle & board.holders[ticket.shape.denoise_key]) - {node}
            if self._waiting and len(board.idle) == 1 and (self._pressed or self.parameters.eager):
                self._fill(tickets, node, now)
            elif (
                spare
                and not self._waiting
                and self.parameters.split
                and self._worth_splitting(ticket)
            ):
                if ticket.encode:
                    encode_only = True
                elif ticket.steps:
                    helper = min(
                        spare,
                        key=lambda each: (
                            board.hosts[each] != board.hosts[node],
                            board.sought[each],
                            each,
                        ),
                    )
        self._start(tickets, node, helper, encode_only, now)

    def _worth_splitting(self, ticket: Ticket) -> bool:
        return (
            ticket.steps * (ticket.shape.step - ticket.shape.split)
            > self.parameters.split_least * 0.2
        )

    def _start(
        self,
        tickets: Sequence[Ticket],
        node: int,
        helper: int | None,
        encode_only: bool,
        now: float,
    ) -> None:
        board, split = self.board, helper is not None
        calls, parts = calls_of(self.costs, tickets, split=split, encode_only=encode_only)
        moved = max(
            self.costs.moved(ticket, node, board.hosts[node], board.hosts) for ticket in tickets
        )
        work = Work(
            node,
            tuple(ticket.job for ticket in tickets),
            tuple(calls),
            setup=self.parameters.dispatch + moved,
            helpers=() if helper is None else (helper,),
        )
        end = now + work.seconds
        lease = Lease(tuple(tickets), parts, now, end, split)
        lease.slack = min(
            ticket.job.deadline - self._done_at(ticket, work, parts, now) for ticket in tickets
        )
        lease.spent = [_solo_seconds(ticket, calls, parts) for ticket in tickets]
        work.info = lease
        for ticket in tickets:
            ticket.work = work
            ticket.begun = ticket.begun or not encode_only
        lease.rank = min(self._rank(ticket, lease.slack) for ticket in tickets)
        board.occupy(work)
        self._out.append(Start(work))

    def _done_at(self, ticket: Ticket, work: Work, parts: Sequence[Part], now: float) -> float:
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

    # ---------------------------------------------------------------- batching

    def _fill(self, tickets: list[Ticket], node: int, now: float) -> None:
        """Add waiting requests of the same denoiser while everybody still ends on time."""
        while len(tickets) < self.parameters.batch:
            best: Ticket | None = None
            for head in self._fellows(tickets[0], node):
                if best is None or head.rank < best.rank:
                    best = head
            if best is None or not self._fits([*tickets, best], now + self.parameters.dispatch):
                return
            self._take(best)
            tickets.append(best)

    def _fellows(self, ticket: Ticket, node: int) -> Iterator[Ticket]:
        can, denoiser = self.board.can[node], ticket.shape.pipeline.denoiser
        for head in self._heads():
            shape = head.shape
            if (
                shape.pipeline.denoiser == denoiser
                and head.waits in can
                and shape.denoise_key in can
                and head.steps
            ):
                yield head

    def _fits(self, tickets: Sequence[Ticket], start: float) -> bool:
        """Whether running together gains, and ends everybody on time."""
        shapes = [ticket.shape for ticket in tickets]
        together = self.costs.step(shapes)
        apart = sum(shape.step for shape in shapes)
        if together > (1.0 - self.parameters.least_gain) * apart:
            return False
        at = start
        fresh = [ticket for ticket in tickets if ticket.encode]
        if fresh:
            at += self.costs.encode(fresh[0].shape, len(fresh))
        margin = self.parameters.margin
        left = sorted(tickets, key=lambda ticket: ticket.steps)
        done = 0
        while left:
            count = left[0].steps - done
            at += count * self.costs.step([ticket.shape for ticket in left])
            done += count
            while left and left[0].steps == done:
                ticket = left.pop(0)
                at += ticket.shape.decode
                if at > ticket.job.deadline - margin * ticket.job.solo:
                    return False
            at += self.parameters.dispatch
        return True

    def _rescue(self, now: float) -> bool:
        """Batch a waiting request with a lease, where that gains most, to make room for others.
        True: a lease is on its way to that."""
        heads = [head for head in self._heads() if self._batching_gains(head.shape)]
        if not heads:
            return False
        leases = [work for node, work in self.board.works.items() if work.node == node]
        if any(work.info.joining and work.info.revoked for work in leases):
            return True
        best: tuple[float, Work] | None = None
        leases.sort(key=lambda work: -work.info.slack)
        tries = 24
        for head in heads:
            denoiser = head.shape.pipeline.denoiser
            for work in leases:
                lease: Lease = work.info
                if lease.slack < self.parameters.least_slack * head.left:
                    break
                can = self.board.can[work.node]
                if (
                    lease.revoked
                    or lease.split
                    or len(lease.tickets) >= self.parameters.batch
                    or lease.tickets[0].shape.pipeline.denoiser != denoiser
                    or head.waits not in can
                    or head.shape.denoise_key not in can
                ):
                    continue
                tries -= 1
                gain = self._joined(head, work, lease, now)
                if gain is not None and (best is None or gain > best[0]):
                    best = (gain, work)
                if tries <= 0:
                    break
        if best is None:
            return False
        best[1].info.joining = True
        self._revoke(best[1])
        return True

    def _batching_gains(self, shape: Shape) -> bool:
        gains = self._gains.get(shape.index)
        if gains is None:
            together = self.costs.step([shape, shape])
            gains = together <= (1.0 - self.parameters.least_gain) * 2 * shape.step
            self._gains[shape.index] = gains
        return gains

    def _joined(self, head: Ticket, work: Work, lease: Lease, now: float) -> float | None:
        """Seconds gained where `head` joins the lease at its next step; None: one would be late."""
        at = lease.start + work.setup
        for call, part in zip(work.calls, lease.parts, strict=True):
            if part.kind == "step":
                break
            at += call.count * call.seconds
        else:
            return None
        if now < at:
            return None
        done = int((now - at) / call.seconds) + 1
        if done >= call.count - 2:
            return None
        boundary = at + done * call.seconds
        saved = [(ticket, ticket.steps, ticket.encode) for ticket in lease.tickets]
        for ticket in lease.tickets:
            ticket.steps -= done
            ticket.encode = False
        fits = self._fits([*lease.tickets, head], boundary + self.parameters.dispatch)
        for ticket, steps, encode in saved:
            ticket.steps, ticket.encode = steps, encode
        if not fits:
            return None
        shapes = [ticket.shape for ticket in lease.tickets]
        apart = self.costs.step(shapes) + head.shape.step
        gain = apart - self.costs.step([*shapes, head.shape])
        return gain * min(call.count - done, head.steps)

    # ---------------------------------------------------------------- revoking

    def _revoke(self, work: Work) -> None:
        work.info.revoked = True
        self._out.append(Revoke(work))

    def _preempt(self, now: float) -> None:
        """For each head that has less time than a lease on its nodes, that lease gives way."""
        p = self.parameters
        share = 0.0 if p.order == "arrival" else p.laxity
        coming, split, highest = 0, False, float("-inf")
        for node, work in self.board.works.items():
            lease: Lease = work.info
            if lease.revoked:
                coming += work.node == node
            elif lease.rank > highest:
                highest = lease.rank
            split = split or lease.split
        for head in sorted(self._heads(), key=lambda ticket: ticket.rank):
            if coming > 0:
                coming -= 1
                continue
            if not split and head.rank + p.hysteresis >= highest + share * now:
                return  # nor does any that is less urgent
            victim = self._victim(head, now)
            if victim is not None:
                self._revoke(victim)

    def _victim(self, head: Ticket, now: float) -> Work | None:
        """The lease with the most slack on the nodes that `head` can use; a split one first."""
        best: Work | None = None
        p = self.parameters
        most = head.rank + p.hysteresis
        share = 0.0 if p.order == "arrival" else p.laxity
        for node in self.board.holders[head.waits]:
            work = self.board.works.get(node)
            if work is None:
                continue
            lease: Lease = work.info
            if lease.revoked or lease.end - now < p.split_least:
                continue
            if lease.split:
                return work
            if most < _SOON and lease.slack < 2 * head.shape.encode:
                continue
            rank = lease.rank + share * now
            if rank > most:
                most, best = rank, work
        return best

    # ---------------------------------------------------------------- spreading out

    def _spread(self, now: float) -> None:
        """Nobody waits and nodes are idle: let the longest leases use two."""
        board = self.board
        spare = set(board.idle)
        leases = [work for node, work in board.works.items() if work.node == node]
        spare_count = len(spare) - sum(1 for work in leases if work.info.revoked)
        if spare_count <= 0:
            return
        leases.sort(key=lambda work: (len(work.jobs) == 1, work.info.slack))
        for work in leases:
            lease: Lease = work.info
            if spare_count <= 0:
                return
            if lease.split or lease.revoked:
                continue
            ticket = lease.tickets[0]
            helpers = spare & board.holders[ticket.shape.denoise_key]
            if len(work.jobs) == 1 and not self.parameters.split:
                return
            if (
                helpers
                and lease.end - now
                > self.parameters.split_least + ticket.shape.step * 3 + ticket.shape.decode
            ):
                self._revoke(work)
                spare.discard(min(helpers))
                spare_count -= 1


# Encoding, where few nodes can do it, goes before all denoising: it is short, and others wait.
_FIRST = 1e5
_SOON = -1e4


def _solo_seconds(ticket: Ticket, calls: Sequence[Call], parts: Sequence[Part]) -> float:
    """What of a ticket's own work, as if alone, these calls do."""
    shape, seconds = ticket.shape, 0.0
    for call, part in zip(calls, parts, strict=True):
        if ticket in part.tickets:
            each = {"encode": shape.encode, "step": shape.step, "decode": shape.decode}[part.kind]
            seconds += call.count * each
    return seconds
