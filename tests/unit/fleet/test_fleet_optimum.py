# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The offline optimum: right where it can be counted, and above whatever a policy does."""

from __future__ import annotations

from itertools import combinations

from fleet_cases import LARGE, job
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fleet_optimum import Instance, optimum_of
from kubediffusion.simulate.bound import most_on_time as moore_hodgson
from kubediffusion.simulate.optimum import Demand, best_set, feasible, most_on_time
from kubediffusion.simulate.scenario import simulate

short = st.builds(
    lambda arrival, seconds, slack, width: Demand(
        float(arrival), float(arrival + seconds + slack), float(seconds), width
    ),
    st.integers(0, 6), st.integers(1, 5), st.integers(0, 4), st.integers(1, 2),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(short, min_size=1, max_size=7), st.integers(1, 3))
def test_the_search_finds_the_largest_set(demands, gpus):
    chosen = best_set(demands, gpus)
    assert feasible([demands[i] for i in chosen], gpus)
    for larger in combinations(demands, len(chosen) + 1):
        assert not feasible(larger, gpus)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=9))
def test_on_one_machine_with_all_there_it_is_moore_and_hodgsons(pairs):
    jobs = [job(i, LARGE, 0.0) for i in range(len(pairs))]
    for each, (seconds, deadline) in zip(jobs, pairs, strict=True):
        each.solo, each.deadline = float(seconds), float(deadline)
    demands = [Demand(0.0, each.deadline, each.solo, 1) for each in jobs]
    assert most_on_time(demands, 1) == moore_hodgson(jobs, lambda each: each.solo, 1.0)


def test_two_halves_run_side_by_side_and_a_whole_does_not():
    assert feasible([Demand(0.0, 1.0, 2.0, width=2)], 2)
    assert not feasible([Demand(0.0, 1.0, 2.0, width=1)], 2)
    assert not feasible([Demand(0.0, 1.0, 2.0, width=2)], 1)


def test_no_policy_is_better_than_the_optimum():
    for seed in range(3):
        for policy in ("kubediffusion", "kubediffusion-fair", "clockwork-aware", "diflow"):
            instance = Instance("S-c", 2, 1.2, seed)
            jobs = instance.jobs()
            result = simulate(instance.scenario(policy), jobs=jobs)
            assert sum(map(result.on_time, jobs)) <= optimum_of(jobs, 2)
