# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Nodes that come and go in the simulator, by the decisions that the operator takes."""

from __future__ import annotations

import random

import pytest
from fleet_cases import COSTS, LARGE, MIX, Audited, job, setting
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kubediffusion.errors import InvalidInput
from kubediffusion.scaling import Limits
from kubediffusion.scaling.types import DOWN, Rules
from kubediffusion.simulate.autoscale import Autoscaler, Autoscaling
from kubediffusion.simulate.fleet import Build, build_fleet
from kubediffusion.simulate.workload import Wave

QUICK_DOWN = Rules(window=20.0, policies=DOWN.policies)


def scaled(jobs, least: int, most: int, startup: float, policy: str = "kubediffusion"):
    limits = Limits(least, most, target=1.0, down=QUICK_DOWN)
    scaler = Autoscaler(Autoscaling(limits, interval=2.0, startup=startup))
    build = Build(setting(most, 32.0), COSTS, most, MIX, initial=least)
    fleet = build_fleet(policy, build)
    simulation = Audited(fleet.machines, fleet.policies, jobs, COSTS, hooks=[(2.0, scaler)])
    outcome = simulation.run()
    scaler.finish(simulation)
    return outcome, scaler, simulation


def rush(count: int, gap: float):
    return [job(i, LARGE, gap * i) for i in range(count)]


def test_nodes_come_with_the_load_and_go_after_it():
    jobs = [*rush(60, 0.8), *(job(60 + i, LARGE, 60.0 + 20.0 * i) for i in range(5))]
    outcome, scaler, simulation = scaled(jobs, 1, 6, startup=5.0)
    sizes = [size for _, size in scaler.sizes]
    assert max(sizes) >= 4
    assert sizes[-1] == 1
    assert scaler.node_seconds < 0.7 * 6 * outcome.end
    assert sum(machine.up for machine in simulation.machines) == 1


def test_a_slower_start_serves_fewer_on_time():
    jobs = rush(80, 0.8)

    def on_time(startup: float) -> int:
        outcome, _, _ = scaled(jobs, 1, 6, startup)
        return sum(outcome.finished.get(each.id, 1e9) <= each.deadline for each in jobs)

    assert on_time(0.0) > on_time(10.0) > on_time(40.0)


def test_nothing_is_begun_on_a_node_before_it_serves():
    _, scaler, simulation = scaled(rush(20, 0.5), 1, 4, startup=1000.0)
    assert max(size for _, size in scaler.sizes) == 4
    assert [machine.busy_seconds > 0 for machine in simulation.machines] == [
        True,
        False,
        False,
        False,
    ]


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.0, 6.0), min_size=1, max_size=40), st.floats(0.0, 15.0))
def test_no_request_is_lost_while_nodes_come_and_go(gaps, startup):
    now, jobs = 0.0, []
    for number, gap in enumerate(gaps):
        now += gap
        jobs.append(job(number, LARGE, now))
    outcome, scaler, _ = scaled(jobs, 1, 4, startup)
    assert set(outcome.finished) | set(outcome.shed) == {each.id for each in jobs}
    assert all(1 <= size <= 4 for _, size in scaler.sizes)
    assert scaler.node_seconds <= 4 * outcome.end + 1e-6


def test_a_baseline_of_fixed_shares_cannot_be_scaled():
    with pytest.raises(InvalidInput, match="kubediffusion"):
        scaled([job(0, LARGE, 0.0)], 1, 2, 1.0, policy="shepherd")


def test_a_day_has_its_most_in_the_middle():
    arrivals = Wave(depth=0.8).arrivals(10.0, 600.0, [("A", 1.0)], random.Random(1))
    thirds = [sum(200 * i <= each.time < 200 * (i + 1) for each in arrivals) for i in range(3)]
    assert len(arrivals) == pytest.approx(6000, rel=0.05)
    assert thirds[1] > 2 * max(thirds[0], thirds[2])
