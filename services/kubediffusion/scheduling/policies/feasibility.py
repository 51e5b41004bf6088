# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Who has to go so that the others can be on time, found before anything is spent on them.

Leases can be revoked at any step and go on anywhere, so the question is that of preemptive
scheduling on like machines (Horn, 1974): with `left` seconds before `deadline`, and so a latest
start `lst = deadline - left`, a request must get at least `min(left, max(0, D - lst))` before any
moment D. Everybody can be on time if, for every D, these demands sum to no more than the nodes have
until then. Where they sum to more, the one with the largest demand goes, as in Moore and Hodgson's
rule. Nodes that only some requests can use are tested by themselves.

Among several tenants the one that had and claims most for its weight gives: overloaded nodes are
shared by weight, and who asks for less than its share goes before those who ask for more. With a
floor, no family gives more than its share while another still can.

Most tests are over before any sum is made: n nodes are enough until the (n+1)th latest start, and
again from the moment at which they could have done all that is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kubediffusion.scheduling.policies.tenants import Tenants
from kubediffusion.scheduling.policies.tickets import Claim, Lease, Ticket
from kubediffusion.scheduling.policy import Work

# Seconds of rounding in a sum of demands.
_EPS = 1e-6


@dataclass(slots=True)
class Ledger:
    """How many requests of each family came, and how many of them were lost. ``floor`` is the
    attainment below which no family is pushed while another can give; 0: only numbers count."""

    families: int
    floor: float = 0.0
    came: list[int] = field(init=False)
    lost: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.came = [0] * self.families
        self.lost = [0] * self.families

    def grow(self, families: int) -> None:
        """Further families, which have lost nothing yet."""
        more = [0] * (families - self.families)
        self.came += more
        self.lost += more
        self.families = families

    def can_give(self, family: int) -> bool:
        return self.lost[family] + 1 <= (1.0 - self.floor) * self.came[family]

    def ratio(self, family: int) -> float:
        return self.lost[family] / max(1, self.came[family])


class Claims:
    """What every open request still claims, by the set of nodes that can denoise it.

    ``optimism`` scales what is left: batching and splitting will make it a little less.
    """

    def __init__(self, keys: int, ledger: Ledger, optimism: float) -> None:
        self._ledger = ledger
        self._optimism = optimism
        self.tenants = Tenants()
        self.restart(keys)

    def restart(self, keys: int) -> None:
        """So many keys, and no claims. What tenants were served is not forgotten."""
        # By key, in the order of arrival.
        self._by_key: list[dict[int, Claim]] = [{} for _ in range(keys)]
        self._running: dict[int, Claim] = {}
        self._serial = 0
        self._holders: Sequence[set[int]] = ()
        self._groups: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}

    def tickets(self) -> list[Ticket]:
        """Of all open requests, in the order in which they came."""
        claims = [claim for members in self._by_key for claim in members.values()]
        return [claim.ticket for claim in sorted(claims, key=lambda claim: claim.serial)]

    def ticket_of(self, job: int) -> Ticket | None:
        found = (members[job] for members in self._by_key if job in members)
        claim = next(found, None)
        return None if claim is None else claim.ticket

    def open(self, ticket: Ticket) -> None:
        self._serial += 1
        claim = Claim(ticket, ticket.job.deadline, self._serial)
        ticket.claim = claim
        self._by_key[ticket.shape.denoise_key][ticket.job.id] = claim

    def close(self, ticket: Ticket) -> None:
        del self._by_key[ticket.shape.denoise_key][ticket.job.id]
        self._running.pop(ticket.claim.serial, None)

    def waits(self, ticket: Ticket) -> None:
        """Nothing of it is under way: its claim stays as it is."""
        claim = ticket.claim
        self._running.pop(claim.serial, None)
        claim.left = ticket.left * self._optimism
        claim.lst = claim.deadline - claim.left

    def runs(self, work: Work) -> None:
        """Its tickets claim less and less, down to what the lease leaves."""
        lease: Lease = work.info
        seconds = max(lease.end - lease.start, 1e-9)
        for ticket, spent in zip(lease.tickets, lease.spent, strict=True):
            claim = ticket.claim
            claim.fall = self._optimism * spent / seconds
            claim.base = self._optimism * ticket.left + claim.fall * lease.start
            claim.until = lease.end
            self._running[claim.serial] = claim

    def _progress(self, now: float) -> None:
        for claim in self._running.values():
            until = claim.until
            claim.left = left = claim.base - claim.fall * (now if now < until else until)
            claim.lst = claim.deadline - left

    def first_victim(self, holders: Sequence[set[int]], now: float) -> Ticket | None:
        """The ticket to shed first, or None where everybody can be on time. ``holders[key]`` are
        the nodes of a key; the same object as long as they are the same."""
        if holders is not self._holders:
            self._holders = holders
            self._groups.clear()
        self._progress(now)
        present = [key for key, members in enumerate(self._by_key) if members]
        present.sort(key=lambda key: next(iter(self._by_key[key].values())).serial)
        order = tuple(present)
        if order not in self._groups:
            self._groups[order] = _groups(order, holders)
        for nodes, keys in self._groups[order]:
            members = [claim for key in keys for claim in self._by_key[key].values()]
            for moment in _overloads(members, nodes, now):
                victim = self._choose(members, moment, now)
                if victim is not None:
                    return victim
        return None

    def _choose(self, claims: Sequence[Claim], moment: float, now: float) -> Ticket | None:
        """Of those that claim something before `moment`, the one whose loss helps most."""
        able = [
            (min(claim.left, moment - claim.lst), claim.ticket)
            for claim in claims
            if claim.lst < moment and not claim.ticket.begun and claim.ticket.work is None
        ]
        if not able:
            return None
        lowest = min(ticket.job.priority for _, ticket in able)
        able = [each for each in able if each[1].job.priority == lowest]
        tenants = {ticket.job.tenant: ticket.job.weight for _, ticket in able}
        if len(tenants) > 1:
            greediest = self._greediest(tenants, claims, moment, now)
            able = [each for each in able if each[1].job.tenant == greediest]
        able = self._of_families_that_give(able)
        return max(able, key=lambda each: (each[0], each[1].job.arrival))[1]

    def _greediest(
        self, tenants: Mapping[str, float], claims: Sequence[Claim], moment: float, now: float
    ) -> str:
        """Who had lately, has running and claims before `moment` the most for its weight."""
        sums = {tenant: self.tenants.of(tenant, now) for tenant in tenants}
        for claim in claims:
            tenant = claim.ticket.job.tenant
            if tenant in sums and claim.lst < moment:
                sums[tenant] += min(claim.left, moment - claim.lst)
        return max(sums, key=lambda tenant: (sums[tenant] / tenants[tenant], tenant))

    def _of_families_that_give(
        self, able: list[tuple[float, Ticket]]
    ) -> list[tuple[float, Ticket]]:
        ledger = self._ledger
        if ledger.floor <= 0.0:
            return able
        givers = [each for each in able if ledger.can_give(each[1].shape.family)]
        if givers:
            return givers
        least = min(ledger.ratio(ticket.shape.family) for _, ticket in able)
        return [each for each in able if ledger.ratio(each[1].shape.family) <= least]


def _groups(keys: Sequence[int], holders: Sequence[set[int]]) -> list[tuple[int, tuple[int, ...]]]:
    """The tests to make: so many nodes, and the keys of requests that can only use those. All
    first; keys with the very same nodes are one group."""
    everywhere = set[int]().union(*(holders[key] for key in keys))
    out = [(len(everywhere), tuple(keys))]
    alike: list[tuple[set[int], list[int]]] = []
    for key in keys:
        known = next((group for nodes, group in alike if nodes == holders[key]), None)
        if known is None:
            alike.append((holders[key], [key]))
        else:
            known.append(key)
    for nodes, _ in alike:
        if len(nodes) < len(everywhere):
            inside = tuple(key for other, group in alike if other <= nodes for key in group)
            out.append((len(nodes), inside))
    return out


def _overloads(claims: Sequence[Claim], nodes: int, now: float) -> Iterator[float]:
    """The moments until which more is claimed than the nodes have, of those where the demand's
    slope changes."""
    starts = sorted([claim.lst for claim in claims])
    if not starts:
        return
    if starts[0] < now or not nodes:
        points = [(claim.lst if claim.lst > now else now, 1) for claim in claims]
        points += [(claim.deadline, -1) for claim in claims]
        demand = sum(max(0.0, now - claim.lst) for claim in claims)
        yield from _sweep(points, now, demand, 0, nodes, now)
        return
    if len(starts) <= nodes:
        return
    begin, end = starts[nodes], now + sum([claim.left for claim in claims]) / nodes
    if begin < end:
        yield from _sweep(*_between(claims, begin, end), nodes, now)


def _between(
    claims: Sequence[Claim], begin: float, end: float
) -> tuple[list[tuple[float, int]], float, float, int]:
    """The changes of slope from `begin` to `end`, with the demand and its slope at `begin`."""
    demand, slope = 0.0, 0
    points: list[tuple[float, int]] = []
    for claim in claims:
        lst, deadline = claim.lst, claim.deadline
        if lst > end:
            continue
        if lst >= begin:
            points.append((lst, 1))
        elif deadline < begin:
            demand += claim.left
            continue
        else:
            demand += begin - lst
            slope += 1
        if deadline <= end:
            points.append((deadline, -1))
    return points, begin, demand, slope


def _sweep(
    points: list[tuple[float, int]], at: float, demand: float, slope: int, nodes: int, now: float
) -> Iterator[float]:
    points.sort()
    for moment, change in points:
        demand += slope * (moment - at)
        slope, at = slope + change, moment
        if demand > nodes * (at - now) + _EPS:
            yield at
