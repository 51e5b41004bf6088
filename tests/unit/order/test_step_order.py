# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a node's device does next."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubediffusion.scheduling.order import Entry, FairShare, Kind, Limits, next_batch

NOW = 1000.0
LIMITS = Limits(max_batch=3, ageing_seconds=60.0, fair_quantum_seconds=5.0)


def lease(sequence: int, **fields: object) -> Entry:
    return Entry(Kind.LEASE, sequence, fields.pop("arrival", NOW), **fields)  # type: ignore[arg-type]


def one_shot(sequence: int, **fields: object) -> Entry:
    return Entry(Kind.ONE_SHOT, sequence, fields.pop("arrival", NOW), **fields)  # type: ignore[arg-type]


def first(*entries: Entry, now: float = NOW) -> int:
    """The sequence of what leads the batch."""
    return entries[next_batch(entries, now, LIMITS)[0]].sequence


@st.composite
def queues(draw: st.DrawFn) -> list[Entry]:
    count = draw(st.integers(1, 12))
    running = draw(st.integers(-1, count - 1))
    entries: list[Entry] = []
    for i in range(count):
        kind = draw(st.sampled_from(Kind))
        deadline = draw(st.none() | st.floats(-20, 200))
        entries.append(
            Entry(
                kind,
                i,
                NOW - draw(st.floats(0, 300)),
                priority=draw(st.integers(-2, 2)),
                deadline=None if deadline is None else NOW + deadline,
                expected_remaining_seconds=draw(st.floats(0, 50)),
                share=draw(st.floats(0, 30)),
                batch_key=draw(st.sampled_from([None, "a", "b"])),
                running=kind is Kind.LEASE and i == running,
            )
        )
    return entries


def level(entry: Entry, now: float = NOW) -> int:
    return entry.priority + int((now - entry.arrival) // LIMITS.ageing_seconds)


@given(queues())
def test_the_device_never_idles_while_there_is_work(entries: list[Entry]) -> None:
    chosen = next_batch(entries, NOW, LIMITS)
    assert chosen
    assert len(set(chosen)) == len(chosen) <= LIMITS.max_batch


@given(queues())
def test_nothing_of_a_lower_class_leads(entries: list[Entry]) -> None:
    leader = entries[next_batch(entries, NOW, LIMITS)[0]]
    assert level(leader) == max(level(entry) for entry in entries)


@given(queues())
def test_keys_never_mix_and_exact_work_runs_alone(entries: list[Entry]) -> None:
    batch = [entries[i] for i in next_batch(entries, NOW, LIMITS)]
    if len(batch) > 1:
        assert all(entry.kind is Kind.LEASE for entry in batch)
        assert len({entry.batch_key for entry in batch}) == 1
        assert batch[0].batch_key is not None


@given(queues(), st.randoms(use_true_random=False))
def test_the_order_of_the_list_does_not_matter(entries: list[Entry], random) -> None:
    shuffled = entries[:]
    random.shuffle(shuffled)
    chosen = [entries[i].sequence for i in next_batch(entries, NOW, LIMITS)]
    assert [shuffled[i].sequence for i in next_batch(shuffled, NOW, LIMITS)] == chosen


@given(st.integers(0, 3), st.sampled_from(Kind), st.sampled_from(Kind))
@settings(max_examples=30)
def test_nothing_starves_under_an_endless_stream_of_better_work(
    gap: int, kind: Kind, stream: Kind
) -> None:
    """Each second a fresh task of a class `gap` higher arrives and takes a second."""
    starving = Entry(kind, 0, NOW, priority=0, share=100.0)
    now = NOW
    for i in range(1, 60 * (gap + 2) + 5):
        fresh = Entry(stream, i, now, priority=gap, deadline=now + 1.5)
        if first(starving, fresh, now=now) == 0:
            return
        now += 1.0
    pytest.fail("the task never ran")


def test_without_deadlines_a_lease_runs_to_its_end_first_come_first_served() -> None:
    assert first(lease(1), lease(2)) == 1
    assert first(lease(1), lease(2, running=True)) == 2


def test_a_higher_class_takes_the_device_at_the_next_boundary() -> None:
    assert first(lease(1, running=True), lease(2, priority=1)) == 2


def test_a_one_shot_task_goes_in_between_unless_that_breaks_a_deadline() -> None:
    running = lease(1, running=True, deadline=NOW + 10, expected_remaining_seconds=9.0)
    assert first(running, one_shot(2, expected_remaining_seconds=0.5)) == 2
    assert first(running, one_shot(2, expected_remaining_seconds=2.0)) == 1


def test_a_lease_is_left_only_for_one_that_would_miss_and_when_it_can_afford_it() -> None:
    running = lease(1, running=True, deadline=NOW + 30, expected_remaining_seconds=10.0)
    late = lease(2, deadline=NOW + 8, expected_remaining_seconds=5.0)
    assert first(running, late) == 2
    assert first(replace(running, deadline=NOW + 12), late) == 1
    assert first(running, replace(late, deadline=NOW + 20)) == 1
    assert first(running, replace(late, deadline=NOW + 4)) == 1  # it misses either way


def test_the_least_laxity_goes_first_and_a_lost_deadline_orders_nothing() -> None:
    tight = lease(2, deadline=NOW + 20, expected_remaining_seconds=15.0)
    loose = lease(1, deadline=NOW + 10, expected_remaining_seconds=1.0)
    lost = lease(3, deadline=NOW - 1, expected_remaining_seconds=1.0)
    assert first(loose, tight, lost) == 2
    assert first(lost, lease(4)) == 3


def test_two_pressed_leases_do_not_take_turns() -> None:
    entries = {
        n: lease(n, deadline=NOW + 12, expected_remaining_seconds=5.0, arrival=NOW) for n in (1, 2)
    }
    now, ran = NOW, []
    while entries:
        chosen = first(*entries.values(), now=now)
        ran.append(chosen)
        now += 1.0
        left = entries[chosen].expected_remaining_seconds - 1.0
        entries = {n: replace(e, running=n == chosen) for n, e in entries.items()}
        entries[chosen] = replace(entries[chosen], expected_remaining_seconds=left)
        entries = {n: e for n, e in entries.items() if e.expected_remaining_seconds > 0}
    assert ran == [1] * 5 + [2] * 5
    assert now <= NOW + 12


def test_a_tenant_a_quantum_ahead_makes_way() -> None:
    running = lease(1, running=True, share=9.0)
    assert first(running, lease(2, share=5.0)) == 1
    assert first(running, lease(2, share=3.0)) == 2


def test_fast_leases_fill_a_batch_with_those_under_way_first() -> None:
    entries = [lease(i, batch_key="k") for i in range(5)]
    entries[4] = replace(entries[4], running=True)
    assert {entries[i].sequence for i in next_batch(entries, NOW, LIMITS)} == {0, 1, 4}


def test_tenants_get_service_by_weight() -> None:
    fair = FairShare()
    weights = {"a": 3.0, "b": 1.0}
    for tenant in weights:
        fair.enter(tenant)
    served = {"a": 0, "b": 0}
    for _ in range(400):
        tenant = min(served, key=lambda t: (fair.of(t), t))
        served[tenant] += 1
        fair.charge(tenant, 1.0, weights[tenant])
    assert served == {"a": 300, "b": 100}


def test_time_away_earns_no_credit_and_no_tenant_is_kept() -> None:
    fair = FairShare()
    fair.enter("busy")
    fair.charge("busy", 50.0, 1.0)
    fair.enter("back")
    assert fair.of("back") == 50.0
    fair.leave("busy")
    fair.leave("back")
    assert not list(fair.tenants)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0.01, 5.0)), min_size=1, max_size=120),
    st.lists(st.floats(0.25, 8.0), min_size=4, max_size=4),
)
def test_tenants_with_work_are_never_further_apart_than_one_turn(turns, weights) -> None:
    """Start-time fair queueing's bound: served the least first, any two tenants that are there all
    the time differ by the longest turn for the least weight at most, whoever comes and goes."""
    fair = FairShare()
    always = ["a", "b"]
    for tenant in always:
        fair.enter(tenant)
    names = dict(zip(["a", "b", "c", "d"], weights, strict=True))
    longest = 0.0
    for passer_by, seconds in turns:
        if passer_by in (2, 3):
            tenant = "cd"[passer_by - 2]
            if tenant in set(fair.tenants):
                fair.leave(tenant)
            else:
                fair.enter(tenant)
        turn = min(sorted(fair.tenants), key=fair.of)
        fair.charge(turn, seconds, names[turn])
        longest = max(longest, seconds / names[turn])
        served = [fair.of(each) for each in fair.tenants]
        assert max(served) - min(served) <= longest + 1e-9
