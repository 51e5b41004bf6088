# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a node's device does next: pure functions over the tasks that are ready to run.

The device runs one one-shot task, or one step of one lease (of a batch of leases in ``numerics:
fast``), and then asks again. Three rules, in this order:

1. **Class.** A task's class is its priority plus one for every `Limits.ageing_seconds` since it
   arrived, so that no stream of important work can starve the rest. The highest class goes first.
2. **Choice.** Within a class: tasks whose deadline can still be met by least laxity
   (time to the deadline minus the work that is left), then the others: one-shot tasks before leases
   (they are short, and somebody's whole request waits on them), then the tenant with the least
   weighted service, then first come, first served. A deadline that cannot be met any more orders
   nothing: chasing it would only make the next one late too.
3. **Staying.** A lease that has begun goes on to its end, which gives the least mean latency,
   unless leaving it gains something: see `_gains`. The rule is built so that no two leases can
   take turns at every step.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    ONE_SHOT = "one-shot"
    LEASE = "lease"


@dataclass(frozen=True, slots=True)
class Entry:
    """A task that could run now. Times are seconds of one monotonic clock."""

    kind: Kind
    # The order of arrival; unique, and so the last word between equals.
    sequence: int
    arrival: float
    priority: int = 0
    # When the request has to be through; None: no deadline.
    deadline: float | None = None
    # The work that is left in this task, as far as is known.
    expected_remaining_seconds: float = 0.0
    # The tenant's weighted service, from `FairShare`.
    share: float = 0.0
    # Leases with equal keys may share a forward; None: never (every lease in ``numerics: exact``).
    batch_key: Hashable | None = None
    # This lease was stepped last and could simply go on.
    running: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    max_batch: int = 8
    # Waiting this long is worth one step of priority.
    ageing_seconds: float = 60.0
    # A running lease is left for another tenant's once its own tenant is so far ahead.
    fair_quantum_seconds: float = 5.0


def next_batch(entries: Sequence[Entry], now: float, limits: Limits) -> tuple[int, ...]:
    """Indices of the entries to run now: one one-shot task, or a batch of leases to step once.

    Never empty while there are entries. The answer does not depend on the order of `entries`
    (only on their `sequence`), and leases in it have equal batch keys.
    """
    if len(entries) <= 1:
        return tuple(range(len(entries)))
    classes = [_class(entry, now, limits) for entry in entries]
    highest = max(classes)
    top = [i for i, level in enumerate(classes) if level == highest]

    def order(i: int) -> tuple[int, float, int, float, int]:
        return _order(entries[i], now)

    begun = [i for i in top if entries[i].running]
    if begun:
        current = min(begun, key=order)
        better = [i for i in top if _gains(entries[i], entries[current], now, limits)]
        first = min(better, key=order) if better else current
    else:
        first = min(top, key=order)
    return _fill(entries, classes, first, now, limits)


def laxity(entry: Entry, now: float) -> float | None:
    """How long the entry can still wait; None without a deadline, or with one out of reach."""
    if entry.deadline is None:
        return None
    slack = entry.deadline - now - entry.expected_remaining_seconds
    return slack if slack >= 0 else None


def _class(entry: Entry, now: float, limits: Limits) -> int:
    return entry.priority + int(max(0.0, now - entry.arrival) // limits.ageing_seconds)


def _order(entry: Entry, now: float) -> tuple[int, float, int, float, int]:
    slack = laxity(entry, now)
    if slack is not None:
        return (0, slack, 0, 0.0, entry.sequence)
    return (1, 0.0, int(entry.kind is Kind.LEASE), entry.share, entry.sequence)


def _gains(waiting: Entry, running: Entry, now: float, limits: Limits) -> bool:
    """Whether leaving the running lease for the waiting entry of the same class gains anything.

    It does where the waiting one would miss its deadline by waiting for the lease's end and makes
    it by going first, and the lease can afford that. One-shot tasks go in between unless that
    breaks the lease's deadline. Between tenants it does once one is a whole quantum ahead.
    """
    if waiting.running:
        return False
    slack = laxity(waiting, now)
    spare = laxity(running, now)
    affordable = spare is None or waiting.expected_remaining_seconds <= spare
    pressed = slack is not None and slack < running.expected_remaining_seconds
    if waiting.kind is Kind.ONE_SHOT:
        return affordable
    if pressed:
        return affordable
    return (
        slack is None
        and spare is None
        and waiting.share + limits.fair_quantum_seconds < running.share
    )


def _fill(
    entries: Sequence[Entry], classes: Sequence[int], first: int, now: float, limits: Limits
) -> tuple[int, ...]:
    """The chosen entry and, where it may be batched, its fellows: running ones first."""
    chosen = entries[first]
    if chosen.kind is Kind.ONE_SHOT or chosen.batch_key is None:
        return (first,)
    fellows = [
        i
        for i, entry in enumerate(entries)
        if i != first and entry.kind is Kind.LEASE and entry.batch_key == chosen.batch_key
    ]
    fellows.sort(key=lambda i: (-classes[i], not entries[i].running, _order(entries[i], now)))
    return (first, *fellows[: max(0, limits.max_batch - 1)])


class FairShare:
    """Weighted service of the tenants that have work here, as in start-time fair queueing.

    A tenant that comes (back) starts level with the least served one present: time away earns no
    credit, and costs none. Tenants without work are forgotten, so the ledger is as large as the
    queue at most.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._entries: dict[str, int] = {}

    def enter(self, tenant: str) -> None:
        if tenant not in self._served:
            self._served[tenant] = min(self._served.values(), default=0.0)
            self._entries[tenant] = 0
        self._entries[tenant] += 1

    def leave(self, tenant: str) -> None:
        self._entries[tenant] -= 1
        if not self._entries[tenant]:
            del self._served[tenant], self._entries[tenant]

    def charge(self, tenant: str, seconds: float, weight: float) -> None:
        if tenant in self._served:
            self._served[tenant] += seconds / weight

    def of(self, tenant: str) -> float:
        return self._served.get(tenant, 0.0)

    @property
    def tenants(self) -> Iterable[str]:
        return self._served.keys()
