# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Who has to go so that the others can be on time, found before anything is spent on them.

Leases can be revoked at any step and go on anywhere, so the question is that of preemptive
scheduling on like machines (Horn, 1974): with `left` seconds before `deadline`, and so a latest
start `lst = deadline - left`, a request must get at least `min(left, max(0, D - lst))` before any
moment D. Everybody can be on time if, for every D, these demands sum to no more than the nodes have
until then. Where they sum to more, the one with the largest demand goes, as in Moore and Hodgson's
rule. Nodes that only some requests can use are tested by themselves. With a floor, no family gives
more than its share while another still can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kubediffusion.scheduling.policies.tickets import Ticket


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


@dataclass(slots=True)
class Claim:
    """A request in a test: the seconds that are left of it, and the latest moment to start them."""

    ticket: Ticket
    left: float
    lst: float
    deadline: float


def first_victim(
    claims: Sequence[Claim], holders: Sequence[set[int]], now: float, ledger: Ledger
) -> Ticket | None:
    """The ticket to shed first, or None where everybody can be on time."""
    groups: dict[int, list[Claim]] = {}
    for claim in claims:
        groups.setdefault(claim.ticket.shape.denoise_key, []).append(claim)
    everywhere = set[int]().union(*(holders[key] for key in groups))
    victim = _overload(claims, len(everywhere), now, ledger)
    if victim is not None or len(groups) < 2:
        return victim
    # Requests that can use the very same nodes are one group.
    alike: list[tuple[set[int], list[Claim]]] = []
    for key, members in groups.items():
        nodes = holders[key]
        known = next((each for each in alike if each[0] == nodes), None)
        if known is None:
            alike.append((nodes, list(members)))
        else:
            known[1].extend(members)
    for nodes, _ in alike:
        if len(nodes) == len(everywhere):
            continue
        inside = [each for other, members in alike if other <= nodes for each in members]
        victim = _overload(inside, len(nodes), now, ledger)
        if victim is not None:
            return victim
    return None


def _overload(claims: Sequence[Claim], nodes: int, now: float, ledger: Ledger) -> Ticket | None:
    """Sweep over the moments at which the demand's slope changes."""
    points = [(claim.lst if claim.lst > now else now, 1) for claim in claims]
    points += [(claim.deadline, -1) for claim in claims]
    points.sort()
    demand = sum(max(0.0, now - claim.lst) for claim in claims)
    slope, at = 0, now
    for moment, change in points:
        demand += slope * (moment - at)
        slope, at = slope + change, moment
        if demand > nodes * (at - now) + 1e-6:
            victim = _choose(claims, at, ledger)
            if victim is not None:
                return victim
    return None


def _choose(claims: Sequence[Claim], moment: float, ledger: Ledger) -> Ticket | None:
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
    if ledger.floor > 0.0:
        givers = [each for each in able if ledger.can_give(each[1].shape.family)]
        if not givers:
            least = min(ledger.ratio(ticket.shape.family) for _, ticket in able)
            givers = [each for each in able if ledger.ratio(each[1].shape.family) <= least]
        able = givers
    return max(able, key=lambda each: (each[0], each[1].job.arrival))[1]
