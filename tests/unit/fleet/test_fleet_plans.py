# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Plans fit, feasibility is right where it can be checked by hand, traces are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fleet_cases import COSTS, LARGE, MIX, PIPELINES, SMALL, job
from hypothesis import given, settings
from hypothesis import strategies as st

from kubediffusion.cli.simulate import published_data, read_json
from kubediffusion.errors import InvalidInput
from kubediffusion.scheduling.policies.monolith import equal_partition, load_partition
from kubediffusion.scheduling.residency import Room, models_of, plan_units, units_of
from kubediffusion.simulate.bound import best_attainment, reaches_by_family
from kubediffusion.simulate.settings import costs_of, published_family, published_setting
from kubediffusion.simulate.workload import PUBLISHED_SEED, parse_trace, resampled

GB = 1e9


@settings(max_examples=50, deadline=None)
@given(
    memory=st.lists(st.floats(3.0, 30.0), min_size=1, max_size=8),
    demand=st.fixed_dictionaries({name: st.floats(0.0, 5.0) for name in MIX}),
)
def test_a_plan_never_exceeds_a_nodes_memory(memory, demand):
    units = units_of(PIPELINES, COSTS, demand, len(memory))
    rooms = [Room(i, each * GB) for i, each in enumerate(memory)]
    plan = models_of(plan_units(units, rooms), units)
    for room in rooms:
        assert COSTS.nbytes(plan[room.index]) <= room.nbytes + 1.0


def test_everything_has_a_replica_where_it_can():
    units = units_of(PIPELINES, COSTS, MIX, 3)
    plan = plan_units(units, [Room(i, 16 * GB) for i in range(3)])
    assert {unit.name for unit in units} == set().union(*plan.values())


def test_a_controlnet_is_only_put_beside_its_denoiser():
    units = units_of(PIPELINES, COSTS, MIX, 4)
    for held in plan_units(units, [Room(i, 9.5 * GB) for i in range(4)]).values():
        assert "small-control@small" not in held or "small" in held


def test_more_demand_never_means_fewer_replicas():
    rooms = [Room(i, 12 * GB) for i in range(8)]
    counts = []
    for weight in (0.1, 1.0, 10.0):
        units = units_of(PIPELINES, COSTS, MIX | {"large/A": weight}, 8)
        counts.append(sum("large" in held for held in plan_units(units, rooms).values()))
    assert counts == sorted(counts)


def test_partitions():
    assert equal_partition(PIPELINES, 8) == [3, 3, 2]
    assert load_partition([1.0, 1.0, 6.0], 8) == [1, 1, 6]
    assert sum(load_partition([1.0, 2.0, 6.0], 2)) == 2


def test_the_bound_is_moore_and_hodgsons():
    """Two of three jobs of 3.92 s with deadlines at 7.84 s fit one machine; all fit two."""
    jobs = [job(i, LARGE, 0.0) for i in range(3)]

    def work(each):
        return each.solo

    assert best_attainment(jobs, work, 1.0) == pytest.approx(2 / 3)
    assert best_attainment(jobs, work, 2.0) == 1.0
    assert not reaches_by_family([*jobs, job(3, SMALL, 0.0)], work, 1.0, 0.9)
    assert reaches_by_family([*jobs, job(3, SMALL, 0.0)], work, 2.0, 0.9)


def test_solo_times_are_those_of_the_published_profiles():
    folder = published_data()
    costs = costs_of(
        read_json(folder / "model_profiles.json"), read_json(folder / "transfer_profiles.json")
    )
    expected = {"sd3": 2.139, "sd35": 6.649, "dev": 24.637, "schnell": 2.097}
    for family, seconds in expected.items():
        pipeline = published_family(family)["A"]
        assert pipeline.solo_seconds(costs) == pytest.approx(seconds, abs=2e-3)
    assert costs.nbytes(published_family("sd35")["B"].models) == pytest.approx(36.3e9, rel=2e-3)


def test_a_trace_is_read_and_resampled():
    trace = parse_trace("A 1.0\nB 0.0\n# a comment\nA 3.0\n")
    assert [(each.label, each.time) for each in trace.arrivals] == [("A", 1), ("B", 1), ("A", 4)]
    twice = resampled(trace, 2.0, PUBLISHED_SEED)
    assert [each.time for each in twice.arrivals] == [0.5, 0.5, 2.0, 2.5, 2.5, 4.0]
    assert len(resampled(trace, 1.5, 7).arrivals) == 4
    assert resampled(trace, 1.5, 7) == resampled(trace, 1.5, 7)
    for text in ("A\n", "A x\n", "A -1\n", ""):
        with pytest.raises(InvalidInput):
            parse_trace(text)


def test_a_setting_that_does_not_exist_says_which_do():
    with pytest.raises(InvalidInput, match="S-a"):
        published_setting("S-z")


def test_the_command_writes_what_it_promises(tmp_path: Path):
    from typer.testing import CliRunner

    from kubediffusion.cli.app import app

    out = tmp_path / "out.json"
    arguments = ["simulate", "--setting", "S-b", "--policy", "kubediffusion", "--rate", "1"]
    ran = CliRunner().invoke(app, [*arguments, "--seed", "3", "--json", str(out)])
    assert ran.exit_code == 0, ran.output
    first = out.read_text()
    content = json.loads(first)
    keys = ("attainment", "by_family", "by_workflow", "latency", "gpu_seconds", "bound")
    assert all(key in content for key in keys)
    assert content["attainment"] == 1.0
    CliRunner().invoke(app, [*arguments, "--seed", "3", "--json", str(out)])
    assert out.read_text() == first
    wrong = CliRunner().invoke(app, ["simulate", "--policy", "nobody"])
    assert wrong.exit_code != 0
