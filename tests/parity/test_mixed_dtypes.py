# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Models of one workflow may have dtypes of their own; each works in its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from stages import InProcess

from benchmarks.reference import Case, Setup, cases, png
from kubediffusion.errors import InvalidWorkflow

CASE = Case("text to image", max_sequence_length=16)


@pytest.fixture(scope="module")
def setup(setup_of: Callable[[str], Setup]) -> Setup:
    return setup_of("sd3-f32")


def test_a_transformer_of_another_dtype_draws_what_diffusers_draws_with_casts_between(
    setup: Setup,
) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(setup.path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    asked = {"max_sequence_length": CASE.max_sequence_length}
    texts = (CASE.prompt, None, None)
    embeds = pipe.encode_prompt(*texts, negative_prompt=CASE.negative_prompt, **asked)
    names = ("prompt_embeds", "negative_prompt_embeds")
    names += ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = {name: value.bfloat16() for name, value in zip(names, embeds, strict=True)}
    pipe.transformer.to(torch.bfloat16)
    latents = pipe(
        **given,
        num_inference_steps=CASE.steps,
        guidance_scale=CASE.guidance,
        generator=torch.Generator("cpu").manual_seed(CASE.seed),
        output_type="latent",
    ).images
    config = pipe.vae.config
    with torch.inference_mode():
        image = pipe.vae.decode(latents.float() / config.scaling_factor + config.shift_factor)[0]
    expected = png(pipe.image_processor.postprocess(image, output_type="pil")[0])
    assert InProcess(setup, {"transformer": "bfloat16"}).draw(CASE) == expected


@pytest.mark.parametrize("role", ["text_encoder", "text_encoder_3", "transformer", "vae"])
def test_every_case_can_be_drawn_with_one_model_of_another_dtype(setup: Setup, role: str) -> None:
    ours = InProcess(setup, {role: "bfloat16"})
    for case in cases(setup):
        assert ours.draw(case), case.name


def test_a_controlnet_has_its_transformers_dtype_and_no_other(setup: Setup) -> None:
    ours = InProcess(setup, {"transformer": "bfloat16"})
    assert ours.resolved.models["controlnet.first"].dtype == "bfloat16"
    with pytest.raises(InvalidWorkflow, match=r"models\.controlnet\.first\.dtype.*leave it out"):
        InProcess(setup, {"controlnet.first": "bfloat16"})
