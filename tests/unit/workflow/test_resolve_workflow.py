# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a workflow is refused for before anything starts, and what is pinned."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from sd3_case import HEAD, INDEX, LORAS, controls, resolved, without

from kubediffusion.api import load_workflow
from kubediffusion.errors import InvalidWorkflow
from kubediffusion.workflow import (
    PipelineIndex,
    ResolvedWorkflow,
    StepCache,
    resolve,
    sources,
)

CACHING = "  caching: {steps: {threshold: '0.1', ratios: ['1', '0.9']}}\n"
GRAPH = yaml.safe_load((Path(__file__).parents[3] / "examples/graph.yaml").read_text())


def refused(extra: str = "", index: PipelineIndex = INDEX) -> InvalidWorkflow:
    with pytest.raises(InvalidWorkflow) as caught:
        resolved(extra, index=index)
    return caught.value


def test_models_are_pinned_and_lie_in_their_folders() -> None:
    models = resolved(controls("a") + LORAS).models
    assert list(models) == [
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "transformer",
        "vae",
        "controlnet.a",
    ]
    vae, control = models["vae"], models["controlnet.a"]
    assert (vae.uri, vae.revision, vae.subfolder) == ("hf://org/name", "0123abcd", "vae")
    assert (control.component, control.uri, control.subfolder) == ("controlnet", "hf://org/a", "")
    assert control.class_name == "SD3ControlNetModel"
    assert [lora.name for lora in models["transformer"].loras] == ["ink", "wash"]
    assert models["vae"].loras == models["text_encoder_3"].loras == ()
    assert len({model.identity for model in models.values()}) == 6


def test_other_sources_take_the_commits_they_are_given() -> None:
    workflow = load_workflow(HEAD + controls("a") + LORAS)
    assert [s.uri for s in sources(workflow)] == ["hf://org/a", "hf://org/ink", "hf://org/wash"]
    found = resolve(workflow, INDEX, {("hf://org/a", ""): "c0", ("hf://org/ink", "r1"): "c1"})
    assert found.models["controlnet.a"].revision == "c0"
    assert found.loras["ink"].revision == "c1"


def test_overrides() -> None:
    other = "{dtype: bfloat16, source: {uri: 'hf://org/vae', subfolder: deep/vae, variant: fp16}}"
    found = resolved(f"  models: {{vae: {other}}}\n  slo: {{latencyScale: '1.5'}}\n")
    vae = found.models["vae"]
    assert (vae.uri, vae.subfolder, vae.variant, vae.dtype) == (
        "hf://org/vae",
        "deep/vae",
        "fp16",
        "bfloat16",
    )
    assert found.models["transformer"].dtype == "float32"
    assert found.slo.latency_scale == 1.5


@pytest.mark.parametrize(
    ("extra", "field", "words"),
    [
        ("  models: {transfomer: {dtype: float16}}\n", "spec.models.transfomer", "transformer?"),
        ("  models: {vae: {enabled: false}}\n", "spec.models.vae.enabled", "optional"),
        ("  models: {vae: {tiling: true}}\n", "spec.models.vae.tiling", "cannot do that"),
        (
            "  models: {transformer: {attentionBackend: flash}}\n",
            "spec.models.transformer.attentionBackend",
            "cannot do that",
        ),
        (CACHING, "spec.caching.steps", "numerics: fast"),
        (
            "  caching: {steps: {method: first-block, threshold: '0.1'}}\n",
            "spec.caching.steps.method",
            "step cache is magcache",
        ),
        ("  caching: {steps: {threshold: '0.1'}}\n", "spec.caching.steps.ratios", "needs the"),
        (
            "  caching: {steps: {threshold: '0', ratios: ['1', '1']}}\n",
            "spec.caching.steps.threshold",
            "above 0",
        ),
        ("  inputs: {stepz: {default: 3}}\n", "spec.inputs.stepz", "did you mean steps"),
        ("  inputs: {steps: {default: 0}}\n", "spec.inputs.steps.default", "1 to 1000"),
        ("  inputs: {steps: {default: many}}\n", "spec.inputs.steps.default", "whole number"),
        ("  inputs: {steps: {minimum: 2000}}\n", "spec.inputs.steps", "nothing lies"),
        ("  inputs: {steps: {type: text}}\n", "spec.inputs.steps.type", "leave it out"),
        ("  inputs: {seed: {requires: imag}}\n", "spec.inputs.seed.requires", "image"),
        (
            "  inputs: {steps: {default: '= $facts.vae.patchsize'}}\n",
            "spec.inputs.steps.default",
            "patch_size",
        ),
    ],
)
def test_each_wrong_field_is_named(extra: str, field: str, words: str) -> None:
    found = refused(extra)
    assert found.field == field
    assert words in found.message


def test_a_step_cache_is_as_it_is_written() -> None:
    found = resolved("  numerics: fast\n" + CACHING).step_cache
    assert found == StepCache("magcache", 0.1, (1.0, 0.9), 3, 0.2)
    assert resolved().step_cache is None


def test_a_pipeline_of_another_architecture() -> None:
    flux = PipelineIndex({**INDEX.components, "transformer": "FluxTransformer2DModel"}, "c")
    assert "FluxTransformer2DModel" in refused(index=flux).message
    assert "has no vae" in refused(index=without("vae")).message


def test_a_workflow_may_narrow_and_never_widen() -> None:
    inputs = resolved("  inputs: {steps: {maximum: 5000, minimum: 4}}\n").inputs
    assert (inputs["steps"].minimum, inputs["steps"].maximum) == (4, 1000)


# ---------------------------------------------------------------- graphs written out


def written(**changes: object) -> ResolvedWorkflow:
    """The example with nodes changed: name -> fields of the node, or None to drop it."""
    document = yaml.safe_load(yaml.safe_dump(GRAPH))
    nodes = {node["name"]: node for node in document["spec"]["graph"]["nodes"]}
    for name, change in changes.items():
        if change is None:
            del nodes[name]
        elif isinstance(change, dict):
            node = nodes.setdefault(name, {"name": name, "inputs": {}})
            node["inputs"] |= change.pop("inputs", {})
            node |= change
    document["spec"]["graph"]["nodes"] = list(nodes.values())
    return resolve(load_workflow(yaml.safe_dump(document)), INDEX)


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"decode": {"model": "vea"}}, "nodes[7].model", "did you mean vae"),
        ({"decode": {"stage": "denoise"}}, "nodes[7].stage", "it has encode_image, decode"),
        ({"decode": {"inputs": {"latent": "denoise.latents"}}}, "inputs.latent", "latents?"),
        ({"decode": {"inputs": {"latents": "denoiz.latents"}}}, "inputs.latents", "denoise?"),
        ({"decode": {"inputs": {"latents": "denoise.latent"}}}, "inputs.latents", "latents?"),
        ({"decode": {"inputs": {"latents": "prompt_1.embeds"}}}, "inputs.latents", "tensor["),
        ({"decode": {"inputs": {"latents": "$inputs.prompt"}}}, "inputs.latents", "NODE.OUTPUT"),
        (
            {"denoise": {"inputs": {"prompt_1.embeds": "prompt_2.embeds"}}},
            "inputs.prompt_1.embeds",
            "the port takes tensor[text_encoder.embeds]",
        ),
        ({"denoise": {"inputs": {"steps": "$inputs.stepz"}}}, "inputs.steps", "did you mean steps"),
        ({"denoise": {"inputs": {"steps": "$inputs.prompt"}}}, "inputs.steps", "is text"),
        ({"denoise": {"inputs": {"steps": 2.5}}}, "inputs.steps", "the port takes integer"),
        ({"denoise": {"inputs": {"steps": 5000}}}, "inputs.steps", "out of bounds"),
        ({"denoise": {"inputs": {"guidance": "= 1 >"}}}, "inputs.guidance", "cannot be read"),
        ({"denoise": {"inputs": {"guidance": "= 1 > 2"}}}, "inputs.guidance", "is flag"),
        ({"prompt_1": {"when": "$inputs.guidance > 1"}}, "prompt_1.embeds", "may be left out"),
        ({"decode": {"when": "$inputs.prompt"}}, "spec.graph.output", "has no condition"),
        ({"prompt_1": {"when": "$inputs.guidance >"}}, "nodes[0].when", "cannot be read"),
        (
            {"decode": {"stage": "encode_image", "inputs": {"image": "$inputs.prompt"}}},
            "inputs.image",
            "is text",
        ),
        ({"prompt_1": {"when": "1"}}, "nodes[0].when", "no truth value"),
        ({"prompt_1": None}, "inputs.prompt_1.embeds", "there is no node"),
        (
            {"extra": {"model": "text_encoder", "stage": "encode", "inputs": {"text": "x"}}},
            "nodes[8]",
            "nobody reads",
        ),
    ],
)
def test_each_fault_of_a_graph_is_named(changes: dict[str, object], field: str, words: str) -> None:
    with pytest.raises(InvalidWorkflow) as caught:
        written(**changes)
    assert field in str(caught.value)
    assert words in str(caught.value)


def test_nodes_that_wait_for_each_other() -> None:
    loop = {"model": "vae", "stage": "encode_image"}
    size = {"width": 64, "height": 64, "mode": "control", "image": "$inputs.image", "seed": 1}
    document = yaml.safe_load(yaml.safe_dump(GRAPH))
    document["spec"]["inputs"]["image"] = {"type": "image", "required": True}
    document["spec"]["graph"]["nodes"] += [
        {"name": "a", **loop, "inputs": {**size, "generator": "b.generator"}},
        {"name": "b", **loop, "inputs": {**size, "generator": "a.generator"}},
    ]
    with pytest.raises(InvalidWorkflow, match="a -> b -> a"):
        resolve(load_workflow(yaml.safe_dump(document)), INDEX)


def test_an_input_that_no_node_reads() -> None:
    document = yaml.safe_load(yaml.safe_dump(GRAPH))
    document["spec"]["inputs"]["colour"] = {"type": "text"}
    with pytest.raises(InvalidWorkflow, match="no node reads"):
        resolve(load_workflow(yaml.safe_dump(document)), INDEX)


def test_a_required_port_needs_an_input_that_every_request_has() -> None:
    document = yaml.safe_load(yaml.safe_dump(GRAPH))
    del document["spec"]["inputs"]["steps"]["default"]
    with pytest.raises(InvalidWorkflow, match="may leave steps out"):
        resolve(load_workflow(yaml.safe_dump(document)), INDEX)
    document["spec"]["inputs"]["steps"]["required"] = True
    assert resolve(load_workflow(yaml.safe_dump(document)), INDEX).inputs["steps"].required


def test_an_input_of_no_type() -> None:
    document = yaml.safe_load(yaml.safe_dump(GRAPH))
    del document["spec"]["inputs"]["steps"]["type"]
    with pytest.raises(InvalidWorkflow, match=r"spec\.inputs\.steps\.type"):
        resolve(load_workflow(yaml.safe_dump(document)), INDEX)


def test_all_faults_of_a_graph_are_told_at_once() -> None:
    with pytest.raises(InvalidWorkflow) as caught:
        written(denoise={"inputs": {"steps": "$inputs.x", "guidance": "$inputs.y"}})
    assert "'x'" in str(caught.value)
    assert "'y'" in str(caught.value)
