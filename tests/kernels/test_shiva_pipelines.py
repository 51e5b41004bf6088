# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The five lines of the README, with the pipeline that this repository ships."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img import (
    StableDiffusion3Img2ImgPipeline,
)

from shiva_kernels import Artifact, KeepMap, ShivaConfig, Unsupported, apply_shiva

FOLDER = Path(__file__).parents[2] / "models/tiny-sd3/pipeline"
STEPS, BLOCKS, TOKENS = 6, 8, 64


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **options: Any) -> torch.Tensor:
    settings = {
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "height": 128,
        "width": 128,
        "max_sequence_length": 32,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(7),
    }
    return pipe("a red circle above a blue square", **{**settings, **options}).images


@pytest.fixture
def kept(pipe: Any) -> Iterator[tuple[Any, list[KeepMap]]]:
    torch.manual_seed(0)
    sigmas = tuple(1 - i / STEPS for i in range(STEPS))
    artifact = Artifact.untrained(pipe.transformer, tokens=TOKENS, sigmas=sigmas)
    maps: list[KeepMap] = []
    config = ShivaConfig(artifact, 0.6, pipeline=pipe, on_keep=maps.append)
    handle = apply_shiva(pipe.transformer, config)
    yield handle, maps
    handle.remove()


def test_a_picture_keeps_the_budget_over_its_own_grid_and_the_dense_one_comes_back(
    pipe: Any,
) -> None:
    dense = draw(pipe)
    artifact = Artifact.untrained(pipe.transformer, tokens=TOKENS, sigmas=(1.0, 0.5))
    maps: list[KeepMap] = []
    handle = apply_shiva(
        pipe.transformer, ShivaConfig(artifact, 0.6, pipeline=pipe, on_keep=maps.append)
    )
    assert not torch.equal(draw(pipe), dense)
    assert len(maps) == STEPS * (BLOCKS - 1)
    assert all(m.index.shape[0] == 1 for m in maps)  # one image, its two branches together
    mean = sum(m.index.shape[1] for m in maps) / (len(maps) * TOKENS)
    assert mean == pytest.approx(0.6, abs=1e-3)
    handle.remove()
    assert torch.equal(draw(pipe), dense)


def test_skip_layer_guidance_needs_a_request_around_it(pipe: Any, kept: Any) -> None:
    handle, maps = kept
    options = {"skip_guidance_layers": [2], "skip_layer_guidance_stop": 0.5}
    with pytest.raises(Unsupported, match=r"\.steps\(\)"):
        draw(pipe, **options)
    maps.clear()
    with handle.request().steps():
        draw(pipe, **options)
    extra = 2 * (BLOCKS - 2)  # steps 1 and 2 of 6, without block 0 and the skipped one
    assert len(maps) == STEPS * (BLOCKS - 1) + extra


def test_images_without_guidance_each_keep_their_own_tokens(pipe: Any, kept: Any) -> None:
    _, maps = kept
    draw(pipe, guidance_scale=1.0, num_images_per_prompt=2, output_type="latent")
    assert all(m.index.shape[0] == 2 for m in maps)
    assert any(not torch.equal(*m.index) for m in maps)


def test_image_to_image_takes_its_part_of_the_grid(pipe: Any) -> None:
    part: Any = StableDiffusion3Img2ImgPipeline.from_pipe(pipe)
    part.set_progress_bar_config(disable=True)
    artifact = Artifact.untrained(pipe.transformer, tokens=TOKENS, sigmas=(1.0, 0.5))
    maps: list[KeepMap] = []
    handle = apply_shiva(
        part.transformer, ShivaConfig(artifact, 0.6, pipeline=part, on_keep=maps.append)
    )
    try:
        part(
            "a red circle",
            image=torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1)),
            strength=0.5,
            num_inference_steps=STEPS,
            max_sequence_length=32,
            output_type="latent",
            generator=torch.Generator().manual_seed(7),
        )
        grid = handle.table(0.6).sigmas
        assert len(grid) == STEPS
        ran = sorted({m.sigma for m in maps}, reverse=True)
        assert ran == pytest.approx(list(grid[STEPS // 2 :]), abs=1e-5)
    finally:
        handle.remove()
