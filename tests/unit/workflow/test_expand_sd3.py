# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The tasks of a Stable Diffusion 3 request are those of docs/internals.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sd3_case import FACTS, LORAS, controls, resolved, tasks, without

from kubediffusion.api import load_workflow
from kubediffusion.errors import Unavailable
from kubediffusion.workflow import Constant, PortRef, bind, expand, resolve

ROOT = Path(__file__).parents[3]
CFG = [f"{branch}_{n}" for branch in ("prompt", "negative") for n in (1, 2, 3)]
THREE = resolved(controls("abc") + LORAS)


def value(task: object, port: str) -> object:
    constant = task.inputs[port]  # type: ignore[attr-defined]
    assert isinstance(constant, Constant)
    return constant.value


def test_text_to_image() -> None:
    found = tasks(resolved())
    assert list(found) == [*CFG, "denoise", "decode"]
    denoise = found["denoise"]
    assert denoise.inputs["prompt_1.pooled"] == PortRef("prompt_1", "pooled")
    assert denoise.inputs["negative_3.embeds"] == PortRef("negative_3", "embeds")
    assert {port: value(denoise, port) for port in ("width", "steps", "guidance", "seed")} == {
        "width": 128,
        "steps": 28,
        "guidance": 7.0,
        "seed": 7,
    }
    assert "strength" not in denoise.inputs
    assert (denoise.steps, denoise.outputs, denoise.controlnets) == (28, ("latents",), ())
    assert found["decode"].outputs == ("image",)
    assert found["prompt_3"].outputs == ("embeds",)
    assert value(found["prompt_3"], "max_length") == 256
    assert value(found["negative_1"], "text") == ""


def test_without_guidance_there_is_no_negative_branch() -> None:
    found = tasks(resolved(), {"guidance": 1.0})
    assert list(found) == ["prompt_1", "prompt_2", "prompt_3", "denoise", "decode"]
    assert not [port for port in found["denoise"].inputs if port.startswith("negative")]


@pytest.mark.parametrize("extra", ["", "\n  models: {text_encoder_3: {enabled: false}}\n"])
def test_without_the_third_encoder(extra: str) -> None:
    workflow = resolved(extra) if extra else resolved(index=without("text_encoder_3"))
    found = tasks(workflow)
    assert "text_encoder_3" not in workflow.models
    assert [n for n in found if n.endswith("_3")] == []
    assert value(found["denoise"], "max_sequence_length") == 256


def test_image_to_image_hands_the_generator_on() -> None:
    found = tasks(resolved(), {"image": b"png", "strength": 0.5, "steps": 11})
    init = found["init"]
    assert (init.stage, init.role, value(init, "mode")) == ("encode_image", "vae", "init")
    assert init.outputs == ("latents", "generator")
    denoise = found["denoise"]
    assert denoise.inputs["init.latents"] == PortRef("init", "latents")
    assert denoise.inputs["init.generator"] == PortRef("init", "generator")
    assert denoise.steps == 6  # as diffusers: 11 - int(11 - 5.5)


def test_other_prompts_for_other_encoders() -> None:
    found = tasks(resolved(), {"prompt_2": "two", "prompt_3": "", "negative_prompt": "no"})
    texts = {name: value(found[name], "text") for name in CFG}
    assert texts == {
        "prompt_1": "a cat",
        "prompt_2": "two",
        "prompt_3": "a cat",  # empty is as good as absent, as in diffusers
        "negative_1": "no",
        "negative_2": "no",
        "negative_3": "no",
    }


def test_controlnets_in_the_workflows_order_and_only_those_asked_for() -> None:
    found = tasks(THREE, {"control.c": b"c", "control.a": b"a", "control.c.scale": 0.5})
    assert [n for n in found if n.startswith("control")] == ["control.a", "control.c"]
    denoise = found["denoise"]
    assert denoise.controlnets == (
        ("a", THREE.models["controlnet.a"].identity),
        ("c", THREE.models["controlnet.c"].identity),
    )
    assert value(denoise, "control.c.scale") == 0.5
    assert value(denoise, "control.a.end") == 1.0
    assert "control.b.scale" not in denoise.inputs
    # The global generator of diffusers: c goes on where a stopped, b is not there.
    assert found["control.c"].inputs["generator"] == PortRef("control.a", "generator")
    assert "generator" not in found["control.a"].inputs
    assert found["control.a"].outputs == ("latents", "generator")
    assert found["control.c"].outputs == ("latents",)
    all_three = tasks(THREE, dict.fromkeys(["control.a", "control.b", "control.c"], b"x"))
    assert all_three["control.c"].inputs["generator"] == PortRef("control.b", "generator")
    assert all_three["control.b"].inputs["generator"] == PortRef("control.a", "generator")


def test_a_control_image_is_encoded_for_each_branch() -> None:
    assert value(tasks(THREE, {"control.b": b"b"})["control.b"], "branches") == 2
    single = tasks(THREE, {"control.b": b"b", "guidance": 0.5})["control.b"]
    assert value(single, "branches") == 1


def test_the_first_controlnet_in_use_says_whether_to_shift() -> None:
    both = tasks(THREE, {"control.a": b"a", "control.b": b"b"})
    assert [value(both[f"control.{n}"], "shift") for n in "ab"] == [False, False]
    assert value(tasks(THREE, {"control.b": b"b"})["control.b"], "shift") is True


def test_loras_go_to_the_denoiser_and_the_clips() -> None:
    found = tasks(THREE, {}, {"ink": 0.75})
    with_loras = {name for name, task in found.items() if task.loras}
    assert with_loras == {"prompt_1", "prompt_2", "negative_1", "negative_2", "denoise"}
    assert [(lora.name, lora.scale) for lora in found["denoise"].loras] == [
        ("ink", 0.75),
        ("wash", 0.5),
    ]
    ink = found["denoise"].loras[0]
    assert (ink.uri, ink.revision, ink.weight_name) == ("hf://org/ink", "r1", "ink.safetensors")


def test_a_scale_of_zero_turns_a_lora_off() -> None:
    assert tasks(THREE, {}, {"wash": 0})["denoise"].loras == ()


def test_images_of_one_request_differ_in_their_seed_alone() -> None:
    bound = bind(THREE, {"prompt": "x", "seed": 2**63 - 1}, {}, FACTS)
    assert [bound.image(i).seed for i in range(3)] == [2**63 - 1, 0, 1]
    first, second = (
        {t.name: t for t in expand(THREE, bound.image(i), FACTS)}["denoise"] for i in (0, 1)
    )
    assert {p for p in first.inputs if first.inputs[p] != second.inputs[p]} == {"seed"}


def test_the_graph_written_out_gives_the_presets_tasks() -> None:
    from sd3_case import INDEX

    written = resolve(load_workflow((ROOT / "examples/graph.yaml").read_text()), INDEX)
    preset = resolve(load_workflow((ROOT / "examples/tiny-sd3.yaml").read_text()), INDEX)
    for inputs in (
        {"prompt": "x"},
        {"prompt": "x", "guidance": 0.0},
        {"prompt": "x", "negative_prompt": "y", "width": 64, "steps": 3},
    ):
        ours = expand(written, bind(written, inputs, {}, FACTS), FACTS)
        theirs = expand(preset, bind(preset, inputs, {}, FACTS), FACTS)
        assert ours == theirs


def test_a_missing_fact_is_unavailable_and_named() -> None:
    workflow = resolved()
    with pytest.raises(Unavailable, match="sample_size"):
        bind(workflow, {"prompt": "x"}, {}, {})
    bound = bind(THREE, {"prompt": "x", "control.b": b"b"}, {}, FACTS)
    with pytest.raises(Unavailable, match=r"controlnet\.b"):
        expand(THREE, bound, {})


@given(
    images=st.sets(st.sampled_from(["image", "control.a", "control.b", "control.c"])),
    guidance=st.floats(0, 20),
    steps=st.integers(1, 100),
    lora=st.sampled_from([0.0, 0.5]),
    third=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_tasks_come_in_order_and_every_port_has_a_producer_and_a_reader(
    images: set[str], guidance: float, steps: int, lora: float, third: bool
) -> None:
    workflow = THREE if third else _WITHOUT_THIRD
    inputs = {"prompt": "x", "guidance": guidance, "steps": steps}
    bound = bind(workflow, {**inputs, **dict.fromkeys(images, b"i")}, {"ink": lora}, FACTS)
    made: set[PortRef] = set()
    read = {workflow.graph.output}
    for task in expand(workflow, bound, FACTS):
        refs = {source for source in task.inputs.values() if isinstance(source, PortRef)}
        assert refs <= made
        read |= refs
        made |= {PortRef(task.name, port) for port in task.outputs}
        assert task.model == workflow.models[task.role].identity
    assert made == read


_WITHOUT_THIRD = resolved(controls("abc") + LORAS, index=without("text_encoder_3"))
