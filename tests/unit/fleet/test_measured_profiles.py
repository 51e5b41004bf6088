# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What `kubediffusion profile` writes is what `simulate` reads."""

from __future__ import annotations

import pytest

from kubediffusion.scheduling.pipelines import DECODE
from kubediffusion.simulate.measured import (
    Forward,
    Loaded,
    Shape,
    model_profiles,
    setting_content,
    trace_text,
    transfer_profiles,
)
from kubediffusion.simulate.scenario import Scenario, simulate
from kubediffusion.simulate.settings import costs_of, setting_of
from kubediffusion.simulate.workload import parse_trace

LOADS = [
    Loaded("text_encoder", "text-1", 0.2, 10),
    Loaded("transformer", "dit-1", 0.5, 100),
    Loaded("controlnet.edges", "edges-1", 0.4, 50),
    Loaded("vae", "vae-1", 0.3, 20),
]
FORWARDS = [
    Forward("text-1", "encode", "f", "64x64", 1, 0.01, 1.0, 3),
    Forward("vae-1", "decode", "f", "64x64", 1, 0.05, 4096.0, 3),
    Forward("dit-1", "denoise", "f", "64x64", 2, 0.04, 4096.0, 3),
    Forward("dit-1", "denoise", "f", "64x64", 4, 0.06, 0.0, 3),
    Forward("edges-1", "control", "f", "64x64", 2, 0.02, 0.0, 3),
    Forward("dit-1", "denoise", "f", "128x64", 2, 0.09, 8192.0, 3),
]
SHAPE = Shape("mine", "mine", ["text-1"], "dit-1", "vae-1", ["edges-1"], steps=10, branches=2)


def test_costs_are_what_was_measured() -> None:
    models = model_profiles(LOADS, FORWARDS, device="cpu", version="1")
    costs = costs_of(models, transfer_profiles({1024: 1e-4}, {1024: 1e-3}))
    assert costs.run("dit-1", 2) == 0.04
    assert costs.run("dit-1", 4) == 0.06
    assert costs.run("dit-1", 2, "default@128x64") == 0.09
    assert costs.run("vae-1", 1, DECODE) == 0.05
    assert costs.load("vae-1") == 0.3
    assert costs.nbytes(["dit-1", "edges-1"]) == 150
    assert costs.transfer(1024, same_host=True) == pytest.approx(1e-4)
    assert costs.transfer(1024, same_host=False) == pytest.approx(1e-3)


def test_only_what_ran_by_itself_starts_a_gateways_estimates() -> None:
    stages = model_profiles(LOADS, FORWARDS, device="cpu", version="1")["stages"]
    assert [(each["model"], each["units"]) for each in stages] == [
        ("text-1", 1.0),
        ("vae-1", 4096.0),
        ("dit-1", 4096.0),
        ("dit-1", 8192.0),
    ]


def test_a_measured_workflow_is_simulated() -> None:
    costs = costs_of(model_profiles(LOADS, FORWARDS, device="cpu", version="1"), {})
    setting = setting_of(setting_content(SHAPE, gpus=1, node_bytes=1000.0), "mine")
    plain, controlled = setting.families.all()
    # Two prompts, ten steps of both branches, a picture.
    assert plain.solo_seconds(costs) == pytest.approx(2 * 0.01 + 10 * 0.04 + 0.05)
    assert controlled.solo_seconds(costs) == pytest.approx(2 * 0.01 + 10 * 0.06 + 0.05)

    trace = parse_trace(trace_text([plain, controlled], costs))
    assert {each.label for each in trace.arrivals} == {"A", "B"}
    # At rate 1 the work that comes is about what one node can do.
    solo = [plain, controlled]
    work = sum(solo["AB".index(each.label)].solo_seconds(costs) for each in trace.arrivals)
    assert work / trace.seconds == pytest.approx(1.0, abs=0.2)
    result = simulate(Scenario(setting, costs, trace, "kubediffusion", rate=0.5))
    assert result.as_dict()["attainment"] > 0.9


def test_the_trace_is_the_same_each_time() -> None:
    costs = costs_of(model_profiles(LOADS, FORWARDS, device="cpu", version="1"), {})
    pipelines = setting_of(setting_content(SHAPE, 1, 1000.0), "mine").families.all()
    assert trace_text(pipelines, costs) == trace_text(pipelines, costs)
