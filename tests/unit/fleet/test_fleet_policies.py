# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What holds for every policy, whatever arrives and whatever fails."""

from __future__ import annotations

import pytest
from fleet_cases import (
    COSTS,
    LARGE,
    PIPELINES,
    SMALL,
    build,
    faults,
    job,
    on_time,
    simulated,
    workloads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kubediffusion.scheduling.policies.kubediffusion import KubeDiffusion
from kubediffusion.simulate.fleet import POLICIES
from kubediffusion.simulate.outcome import Options

everyone = pytest.mark.parametrize("policy", POLICIES)
few = settings(max_examples=25, deadline=None)


@everyone
@few
@given(jobs=workloads(), gpus=st.integers(3, 6))
def test_every_request_is_finished_or_shed_once(policy, jobs, gpus):
    outcome, simulation = simulated(policy, jobs, build(gpus))
    assert set(outcome.finished) | set(outcome.shed) == {each.id for each in jobs}
    assert not set(outcome.finished) & set(outcome.shed)
    assert all(simulation.closed[each.id] == 1 for each in jobs)


@everyone
@few
@given(jobs=workloads(), gpus=st.integers(3, 6))
def test_no_forward_runs_twice_and_none_is_left_out(policy, jobs, gpus):
    outcome, simulation = simulated(policy, jobs, build(gpus))
    for each in jobs:
        if each.id not in outcome.finished:
            continue
        pipeline = each.pipeline
        ran = simulation.forwards[each.id, pipeline.denoiser]
        if policy.startswith("diflow"):
            # A task for every branch; a batch of both branches is one call.
            assert pipeline.steps <= ran <= 2 * pipeline.steps
        elif policy.startswith(("kubediffusion", "dedicated")):
            assert ran == pipeline.steps
            assert simulation.forwards[each.id, pipeline.decoder] == 1
        else:
            assert simulation.forwards[each.id, pipeline.name] == 1


@everyone
@few
@given(jobs=workloads(15), failing=faults(4))
def test_lost_slow_and_unreachable_nodes_lose_no_request(policy, jobs, failing):
    outcome, _ = simulated(policy, jobs, build(4), Options(faults=failing))
    assert set(outcome.finished) | set(outcome.shed) == {each.id for each in jobs}


@few
@given(jobs=workloads(), gateways=st.integers(2, 3))
def test_several_gateways_share_nodes_without_losing_anything(jobs, gateways):
    built = build(4, gateways=gateways, follow=False)
    outcome, _ = simulated("kubediffusion", jobs, built, Options(report_interval=0.1))
    assert set(outcome.finished) | set(outcome.shed) == {each.id for each in jobs}


@everyone
@few
@given(jobs=workloads(), seed=st.integers(0, 3))
def test_the_same_run_gives_the_same_result(policy, jobs, seed):
    options = Options(noise=0.1, seed=seed)
    first, _ = simulated(policy, jobs, build(3), options)
    second, _ = simulated(policy, jobs, build(3), options)
    assert first.finished == second.finished
    assert first.shed == second.shed


class _Watched(KubeDiffusion):
    """Asks after every round whether a waiting request could have run on an idle node."""

    def decide(self, now):
        actions = super().decide(now)
        for ticket in self.waiting.heads():
            assert not (self.board.idle & self.board.holders[ticket.waits]), "idle beside work"
        return actions


@few
@given(jobs=workloads(), gpus=st.integers(2, 5), memory=st.sampled_from((9.0, 12.0, 20.0)))
def test_no_node_is_idle_while_it_could_run_what_waits(jobs, gpus, memory):
    import kubediffusion.simulate.fleet as fleet

    kept, fleet.KubeDiffusion = fleet.KubeDiffusion, _Watched
    try:
        simulated("kubediffusion", jobs, build(gpus, memory, follow=False))
    finally:
        fleet.KubeDiffusion = kept


@pytest.mark.parametrize(
    "policy", [p for p in POLICIES if p not in ("clockwork", "diflow", "dedicated")]
)
def test_a_quiet_fleet_serves_everybody_on_time(policy):
    jobs = [job(i, PIPELINES[i % 3], 12.0 * i) for i in range(6)]
    outcome, _ = simulated(policy, jobs, build(4))
    assert on_time(jobs, outcome) == 6


def test_nodes_with_one_model_each_serve_what_has_all_its_models():
    """Five models on five nodes; a ControlNet runs beside its denoiser, which waits for it."""
    jobs = [job(i, PIPELINES[i % 3], 12.0 * i) for i in range(6)]
    outcome, simulation = simulated("dedicated", jobs, build(5))
    assert on_time(jobs, outcome) == 6
    assert all(len(machine.resident) == 1 for machine in simulation.machines)
    plain, controlled = (outcome.finished[i] - jobs[i].arrival for i in (0, 1))
    assert controlled == pytest.approx(plain, abs=0.1)
    too_few, _ = simulated("dedicated", jobs, build(4))
    assert too_few.shed


def test_a_lone_request_is_split_over_idle_nodes():
    alone = job(0, LARGE, 0.0)
    outcome, _ = simulated("kubediffusion", [alone], build(2))
    assert outcome.finished[0] < 0.65 * alone.solo


def test_a_request_waits_for_nobody_less_urgent():
    """Two nodes with long leases; a short request comes, and one lease gives way at its step."""
    jobs = [job(0, LARGE, 0.0), job(1, LARGE, 0.0), job(2, SMALL, 0.5)]
    outcome, _ = simulated("kubediffusion", jobs, build(2))
    assert on_time(jobs, outcome) == 3
    assert outcome.finished[2] < outcome.finished[0]


def test_the_doomed_cost_nothing():
    """Ten at once on one node: those that cannot be on time are shed before they begin."""
    jobs = [job(i, LARGE, 0.0, scale=2.1) for i in range(10)]
    outcome, _ = simulated("kubediffusion", jobs, build(1))
    assert set(outcome.finished) == {each.id for each in jobs} - set(outcome.shed)
    assert on_time(jobs, outcome) == len(outcome.finished) == 2
    assert outcome.gpu_seconds < 2.1 * LARGE.solo_seconds(COSTS)


def test_important_requests_are_shed_last():
    jobs = [job(i, LARGE, 0.001 * i) for i in range(6)]
    jobs[5].priority = 1
    outcome, _ = simulated("kubediffusion", jobs, build(1))
    assert 5 in outcome.finished
    assert on_time([jobs[5]], outcome) == 1


def test_no_request_ever_causes_a_load():
    """A family without a node waits or is shed; nothing is loaded for it without a plan."""
    jobs = [job(i, SMALL if i % 2 else LARGE, 0.2 * i) for i in range(20)]
    outcome, _ = simulated("kubediffusion", jobs, build(2, 12.0, follow=False))
    assert outcome.loads == 0
