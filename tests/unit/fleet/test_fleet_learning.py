# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a live driver tells a policy beside what the simulator does: new times, requests that leave
and requests that were begun elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fleet_cases import COSTS, LARGE, PIPELINES, SMALL, build, job, workloads
from hypothesis import given, settings
from hypothesis import strategies as st

from kubediffusion.scheduling.policies.kubediffusion import KubeDiffusion
from kubediffusion.scheduling.policy import Finish, Node, Start
from kubediffusion.simulate.engine import Simulation
from kubediffusion.simulate.fleet import build_fleet

few = settings(max_examples=25, deadline=None)
MODELS = dict.fromkeys(COSTS.models, 1.0)


def idle(nodes: int = 2) -> KubeDiffusion:
    records = [Node(place, 0, 1e12, dict(MODELS)) for place in range(nodes)]
    policy = KubeDiffusion(records, COSTS, PIPELINES)
    policy.fleet_changed(0.0)
    return policy


@few
@given(jobs=workloads(), at=st.lists(st.floats(0.0, 20.0), max_size=6))
def test_being_told_the_same_again_changes_nothing(jobs, at):
    def told_again(simulation: Simulation, now: float) -> None:
        policy = simulation.policies[0]
        assert isinstance(policy, KubeDiffusion)
        policy.learnt(simulation.costs, list(PIPELINES), now)

    outcomes = []
    for hooks in ([], [(time, told_again) for time in at]):
        fleet = build_fleet("kubediffusion", build(3))
        outcomes.append(
            Simulation(fleet.machines, fleet.policies, jobs, fleet.costs, hooks=hooks).run()
        )
    assert outcomes[0].finished == outcomes[1].finished
    assert outcomes[0].shed == outcomes[1].shed


def test_other_times_count_from_then_on():
    policy = idle(1)
    policy.arrived(job(0, SMALL, 0.0, 50.0), 0.0)
    policy.decide(0.0)
    waiting = job(1, SMALL, 0.0, 50.0)
    policy.arrived(waiting, 0.0)
    policy.decide(0.0)
    policy.learnt(COSTS.scaled({"small": 100.0}), PIPELINES, 0.1)
    actions = policy.decide(0.1)
    assert [type(each).__name__ for each in actions] == ["Shed"]
    assert actions[0].job is waiting  # type: ignore[union-attr]


def test_a_pipeline_that_is_new_is_served():
    policy = idle(1)
    other = replace(SMALL, name="other/A", family="other", steps=3)
    policy.learnt(COSTS, (*PIPELINES, other), 0.0)
    policy.arrived(job(0, other, 0.0), 0.0)
    (start,) = policy.decide(0.0)
    assert isinstance(start, Start)
    assert [call.count for call in start.work.calls] == [1, 3, 1]


def test_a_node_that_is_new_is_used():
    records = [Node(0, 0, 1e12, dict(MODELS))]
    policy = KubeDiffusion(records, COSTS, PIPELINES)
    policy.fleet_changed(0.0)
    records.append(Node(1, 0, 1e12, dict(MODELS)))
    policy.fleet_changed(0.0)
    for number in range(2):
        policy.arrived(job(number, LARGE, 0.0, 10.0), 0.0)
    starts = [each for each in policy.decide(0.0) if isinstance(each, Start)]
    assert {start.work.node for start in starts} == {0, 1}


def test_others_work_keeps_a_node_while_there_are_others():
    policy = idle(1)
    policy.shares(True, 0.0)
    policy.nodes[0].foreign_until = 5.0
    policy.arrived(job(0, SMALL, 0.0, 50.0), 0.0)
    assert list(policy.decide(0.0)) == []
    assert policy.wake_at(0.0) == pytest.approx(5.0, abs=0.01)
    policy.nodes[0].foreign_until = 0.0
    policy.shares(False, 1.0)
    (start,) = policy.decide(1.0)
    assert isinstance(start, Start)


def test_a_request_that_leaves_is_not_begun_and_presses_nobody():
    policy = idle(1)
    first, second, third = (job(number, LARGE, 0.0, 2.0) for number in range(3))
    policy.arrived(first, 0.0)
    policy.decide(0.0)
    policy.arrived(second, 0.0)
    policy.withdrawn(second, 0.0)
    policy.withdrawn(third, 0.0)  # unknown
    assert list(policy.decide(0.0)) == []
    assert policy.wake_at(0.0) is None


def test_a_request_that_was_begun_elsewhere_goes_on_from_there():
    policy = idle(1)
    begun = replace(job(0, SMALL, 0.0), encoded=True, steps=4)
    policy.arrived(begun, 0.0)
    (start,) = policy.decide(0.0)
    assert isinstance(start, Start)
    assert [(call.model, call.count) for call in start.work.calls] == [("small", 4), ("vae", 1)]
    start.work.done = [4, 1]
    policy.ended(start.work, 1.0)
    assert list(policy.decide(1.0)) == [Finish(begun)]
