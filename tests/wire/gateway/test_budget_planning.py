# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A request's budget in the gateway: checked, sent along, and counted as less work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kubediffusion import api
from kubediffusion import workflow as wf
from kubediffusion.client.core import build_request
from kubediffusion.errors import InvalidInput
from kubediffusion.gateway import planning
from kubediffusion.v1alpha1 import node_pb2
from kubediffusion.workflow import PipelineIndex, ResolvedWorkflow

INDEX = PipelineIndex(
    {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
    }
)
FACTS = {
    "vae": {"vae_scale_factor": 8},
    "transformer": {
        "patch_size": 2,
        "sample_size": 16,
        "pos_embed_max_size": 12,
        "budgets": "0.8,0.6",
        "blocks": 4,
    },
}
WORKFLOW = """
apiVersion: kubediffusion.io/v1alpha1
kind: DiffusionWorkflow
metadata: {name: w}
spec:
  pipeline: {preset: StableDiffusion3, source: {uri: "hf://org/name"}}
  numerics: fast
  models: {transformer: {%s}}
"""
PRUNING = "pruning: {artifact: {uri: 'hf://org/pruned'}, budget: '0.8', maxBudget: '0.8'}"


def workflow(transformer: str = PRUNING) -> ResolvedWorkflow:
    return wf.resolve(api.load_workflow(WORKFLOW % transformer), INDEX)


def planned(workflow: ResolvedWorkflow, **options: Any) -> dict[str, Any]:
    request = build_request("w", "", inputs={"prompt": "a cat", "steps": 10}, **options)
    order = planning.read_order(request, workflow, 8)
    (plan,) = planning.plan_images(order, order.bind(FACTS), FACTS, "r")
    return {task.name: task for task in plan.tasks}


def test_the_denoiser_is_told_the_budget_and_counts_as_less_work() -> None:
    default, asked = planned(workflow()), planned(workflow(), budget=0.6)
    assert default["denoise"].template.budget == 0.8
    assert asked["denoise"].template.budget == 0.6
    dense = replace(workflow(), pruning=wf.Pruning(1.0))
    full = planned(dense)["denoise"]
    assert not full.template.HasField("budget")
    assert full.units == 10 * 128 * 128
    assert asked["denoise"].units == pytest.approx(full.units * (1 + 3 * 0.6) / 4)
    assert asked["decode"].units == planned(dense)["decode"].units


def test_a_wrong_budget_is_refused_before_anything_is_placed() -> None:
    for facts, budget, words in ((FACTS, 0.7, "0.8, 0.6 can"), ({}, 0.9, "0 to 0.8 is allowed")):
        request = build_request("w", "", inputs={"prompt": "a cat"}, budget=budget)
        with pytest.raises(InvalidInput, match=words) as info:
            planning.read_order(request, workflow(), 8).check(facts)
        assert info.value.field == "budget"


def test_a_step_cache_goes_along_and_counts_as_less_work() -> None:
    cache = wf.StepCache("magcache", 0.06, (1.0, 0.99, 0.99), 3, 0.2)
    cached = replace(workflow(), step_cache=cache)
    ours, whole = planned(cached)["denoise"], planned(workflow())["denoise"]
    assert ours.template.step_cache.threshold == 0.06
    assert list(ours.template.step_cache.ratios) == [1.0, 0.99, 0.99]
    assert ours.units == pytest.approx(whole.units * wf.computed_share(cache, 10))
    assert ours.units < whole.units
    assert not whole.template.HasField("step_cache")


def test_an_exact_request_computes_every_step() -> None:
    cached = replace(workflow(), step_cache=wf.StepCache("magcache", 0.06, (1.0, 0.99), 3, 0.2))
    exact = planned(cached, numerics="exact")["denoise"]
    assert not exact.template.HasField("step_cache")
    assert exact.units == planned(workflow())["denoise"].units


def test_exact_numerics_of_a_compiled_model_are_refused() -> None:
    compiled = workflow("compile: default")
    assert planned(compiled)["denoise"].template.numerics == node_pb2.NUMERICS_FAST
    with pytest.raises(InvalidInput, match="is compiled") as info:
        planned(compiled, numerics="exact")
    assert info.value.field == "numerics"
