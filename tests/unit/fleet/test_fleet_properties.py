# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Deferred inputs, memory, feasibility, and what tenants are due: whatever arrives."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from fleet_cases import (
    CONTROLLED,
    COSTS,
    LARGE,
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

import kubediffusion.simulate.fleet as fleet
from kubediffusion.scheduling.policies.diflow import DiFlow
from kubediffusion.scheduling.policies.feasibility import Claims, Ledger
from kubediffusion.scheduling.policies.tickets import Shape, Ticket
from kubediffusion.simulate.outcome import Options

few = settings(max_examples=25, deadline=None)
many = settings(max_examples=200, deadline=None)


# ------------------------------------------------------------------ deferred inputs


@few
@given(jobs=workloads(12, (CONTROLLED,)), gpus=st.integers(1, 3))
def test_waiting_for_deferred_inputs_never_locks_up(jobs, gpus):
    """The denoiser starts before its ControlNet is done; on one node that could wait for ever."""
    outcome, simulation = simulated("diflow-no-abort", jobs, build(gpus))
    assert set(outcome.finished) == {each.id for each in jobs}
    for each in jobs:
        ran = simulation.forwards[each.id, "small-control"]
        assert CONTROLLED.steps <= ran <= 2 * CONTROLLED.steps


class _Watched(DiFlow):
    """Asks after every round whether a ready task is left while a worker is available."""

    def decide(self, now):
        actions = super().decide(now)
        free = [node for node in self.nodes if self._available(node.index)]
        assert not free or not any(self._counts.values()), "idle beside ready tasks"
        return actions


@few
@given(jobs=workloads(15), gpus=st.integers(1, 4))
def test_diflow_leaves_no_ready_task_beside_a_free_worker(jobs, gpus):
    kept, fleet.DiFlow = fleet.DiFlow, _Watched
    try:
        simulated("diflow", jobs, build(gpus))
    finally:
        fleet.DiFlow = kept


# ------------------------------------------------------------------ memory


@few
@given(jobs=workloads(40), gpus=st.integers(2, 5), memory=st.floats(10.5, 24.0), failing=faults(5))
def test_following_the_demand_never_exceeds_a_nodes_memory(jobs, gpus, memory, failing):
    """Plans change, nodes load and are lost meanwhile; `Audited` looks after every event."""
    failing = tuple(each for each in failing if each.node < gpus - 1)
    outcome, simulation = simulated(
        "kubediffusion", jobs, build(gpus, memory), Options(faults=failing)
    )
    assert set(outcome.finished) | set(outcome.shed) == {each.id for each in jobs}
    assert all(machine.peak <= machine.memory + 1.0 for machine in simulation.machines)


# ------------------------------------------------------------------ feasibility

_HOLDERS = ({0, 1, 2}, {1, 2, 3}, {2})


def _shape(key: int) -> Shape:
    return Shape(key, (SMALL, CONTROLLED, LARGE)[key], 9, key, key, 0.0, 1.0, 1.0, 0.0)


@st.composite
def claims(draw) -> list[Ticket]:
    """Requests of 1 to 9 seconds, with more or less time than that."""
    out = []
    for number in range(draw(st.integers(1, 14))):
        key, seconds = draw(st.integers(0, 2)), draw(st.integers(1, 9))
        deadline = seconds + draw(st.integers(0, 12))
        base = job(number, SMALL, 0.0)
        ticket = Ticket(base, _shape(key), encode=False, steps=seconds, decode=False)
        base.deadline, base.tenant = float(deadline), draw(st.sampled_from(("a", "b")))
        base.weight = 1.0 if base.tenant == "a" else 3.0
        out.append(ticket)
    return out


def _opened(tickets) -> Claims:
    out = Claims(3, Ledger(3), optimism=1.0)
    for ticket in tickets:
        out.open(ticket)
        out.waits(ticket)
    return out


def _short(tickets, now: float) -> bool:
    """Horn's condition at every whole moment, for every set of nodes, the slow way."""
    groups = [(set().union(*(_HOLDERS[t.shape.denoise_key] for t in tickets)), tickets)]
    for nodes in _HOLDERS:
        groups.append((nodes, [t for t in tickets if _HOLDERS[t.shape.denoise_key] <= nodes]))
    for nodes, members in groups:
        for moment in range(int(now), 40):
            demand = sum(min(t.left, max(0.0, moment - (t.job.deadline - t.left))) for t in members)
            if demand > len(nodes) * (moment - now) + 1e-6:
                return True
    return False


@many
@given(tickets=claims())
def test_somebody_is_shed_just_where_the_nodes_fall_short(tickets):
    victim = _opened(tickets).first_victim(_HOLDERS, 0.0)
    assert (victim is not None) == _short(tickets, 0.0)


@many
@given(tickets=claims())
def test_after_shedding_the_rest_is_feasible(tickets):
    register = _opened(tickets)
    open_tickets = list(tickets)
    while (victim := register.first_victim(_HOLDERS, 0.0)) is not None:
        register.close(victim)
        open_tickets.remove(victim)
    assert not open_tickets or not _short(open_tickets, 0.0)


# ------------------------------------------------------------------ several gateways


def test_gateways_that_share_nodes_leave_scarce_encoders_to_encoding():
    """Six nodes, of which two hold the encoders beside a denoiser that the others have as well."""
    jobs = [job(i, LARGE, 0.3 * i) for i in range(40)]
    options = Options(report_interval=0.1, timeline=True)
    for gateways, denoises in ((1, True), (3, False)):
        outcome, simulation = simulated(
            "kubediffusion", jobs, build(6, 14.0, gateways=gateways, follow=False), options
        )
        scarce = {each.index for each in simulation.machines if "text" in each.resident}
        assert len(scarce) == 2
        longest = max(span.end - span.start for span in outcome.spans if span.node in scarce)
        assert (longest > 0.5) is denoises
        assert on_time(jobs, outcome) > 5


def test_a_family_that_only_scarce_nodes_can_serve_is_served():
    jobs = [job(i, SMALL, 1.0 * i) for i in range(12)]
    outcome, simulation = simulated(
        "kubediffusion", jobs, build(6, 9.0, gateways=2, follow=False), Options(report_interval=0.1)
    )
    holders = [each for each in simulation.machines if "small" in each.resident]
    assert all("text" in each.resident for each in holders)
    assert on_time(jobs, outcome) == 12


# ------------------------------------------------------------------ tenants


def _of_tenants(count: int, gap: float, weights: dict[str, float], shares: dict[str, float]):
    """Requests of LARGE, `gap` apart, of tenants drawn by `shares`."""
    rng = random.Random(7)
    jobs = []
    for number in range(count):
        each = job(number, LARGE, gap * number)
        each.tenant = rng.choices(list(shares), list(shares.values()))[0]
        each.weight = weights[each.tenant]
        jobs.append(each)
    return jobs


def _served(jobs, outcome, tenant: str) -> float:
    """The share of a tenant's requests that were on time."""
    own = [each for each in jobs if each.tenant == tenant]
    return on_time(own, outcome) / len(own)


@pytest.mark.parametrize("policy", ["kubediffusion", "kubediffusion-fair"])
def test_overloaded_nodes_are_shared_by_weight(policy):
    """Two tenants ask for 1.5 times what two nodes can do, each; one has three times the weight."""
    weights = {"a": 3.0, "b": 1.0}
    gap = LARGE.solo_seconds(COSTS) / 2 / 3.0
    jobs = _of_tenants(240, gap, weights, {"a": 1.0, "b": 1.0})
    outcome, _ = simulated(policy, jobs, build(2))
    ratio = _served(jobs, outcome, "a") / _served(jobs, outcome, "b")
    assert 2.2 < ratio < 4.2
    assert on_time(jobs, outcome) * LARGE.solo_seconds(COSTS) > 0.8 * 2 * 240 * gap


def test_a_tenant_within_its_share_loses_little_to_one_that_floods():
    """A tenth of three times what six nodes can do, beside the other nine tenths."""
    weights = {"modest": 1.0, "flood": 1.0}
    gap = LARGE.solo_seconds(COSTS) / 6 / 3.0
    jobs = _of_tenants(480, gap, weights, {"modest": 1.0, "flood": 9.0})
    outcome, _ = simulated("kubediffusion", jobs, build(6))
    assert _served(jobs, outcome, "modest") > 0.95
    assert _served(jobs, outcome, "flood") < 0.35


@few
@given(jobs=workloads(), gpus=st.integers(1, 4))
def test_weights_of_a_single_tenant_change_nothing(jobs, gpus):
    weighted = [replace(each, tenant="a", weight=5.0) for each in jobs]
    plain, _ = simulated("kubediffusion", jobs, build(gpus, 32.0))
    same, _ = simulated("kubediffusion", weighted, build(gpus, 32.0))
    assert plain.finished == same.finished
    assert plain.shed == same.shed
