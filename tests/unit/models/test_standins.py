# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Stand-ins keep a family's contract, and a step lost or done twice shows in their picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kubediffusion import models
from kubediffusion.errors import InvalidInput
from kubediffusion.models.base import Denoiser, LoadSpec, Lora

STEPS = 5


def standin(component: str, **options: str) -> Any:
    here = Path()
    return models.load(LoadSpec("id", "standin", component, here, here, options=options))


def inputs(**changed: Any) -> Mapping[str, Any]:
    return {"steps": STEPS, "seed": 1, "prompt_1.embeds": torch.tensor([7])} | changed


def picture(**changed: Any) -> np.ndarray:
    denoiser = standin("transformer")
    denoising = denoiser.start(inputs(**changed))
    while denoising.step < denoising.total_steps:
        denoiser.advance([denoising])
    return standin("vae").run("decode", denoising.finish())["image"]


def test_equal_requests_draw_equal_pictures_and_others_do_not() -> None:
    assert np.array_equal(picture(), picture())
    other = torch.tensor([8])
    for changed in ({"seed": 2}, {"steps": STEPS - 1}, {"prompt_1.embeds": other}, {"x": 0.5}):
        assert not np.array_equal(picture(), picture(**changed))


def test_the_picture_depends_on_every_step() -> None:
    denoiser = standin("transformer")
    assert isinstance(denoiser, Denoiser)
    denoising = denoiser.start(inputs())
    seen = {denoising.preview().tobytes()}
    for step in range(STEPS):
        denoiser.advance([denoising])
        seen.add(denoising.preview().tobytes())
        assert denoising.step == step + 1
    assert len(seen) == STEPS + 1


def test_it_goes_on_exactly_from_every_checkpoint() -> None:
    denoiser = standin("transformer")
    expected = picture()
    for stop in range(STEPS + 1):
        first = denoiser.start(inputs())
        for _ in range(stop):
            denoiser.advance([first])
        second = denoiser.start(inputs(), resume=first.checkpoint())
        for _ in range(STEPS - stop):
            denoiser.advance([second])
        image = standin("vae").run("decode", second.finish())["image"]
        assert np.array_equal(image, expected), f"resumed after step {stop}"


def test_a_lora_counts() -> None:
    denoiser = standin("transformer")
    states = {
        int(denoiser.start(inputs(), loras).finish()["latents"].item())
        for loras in ([], [Lora("a", Path(), 1.0)], [Lora("a", Path(), 0.5)])
    }
    assert len(states) == 3


def test_a_batch_draws_what_each_draws_alone() -> None:
    denoiser = standin("transformer")
    alone = [denoiser.start(inputs(seed=seed)) for seed in range(3)]
    together = [denoiser.start(inputs(seed=seed)) for seed in range(3)]
    assert len({denoiser.batch_key(each) for each in together}) == 1
    for each in alone:
        denoiser.advance([each])
    denoiser.advance(together)
    assert [each.state for each in alone] == [each.state for each in together]


def test_a_wrong_input_is_named() -> None:
    for component, stage, given, field in (
        ("text_encoder", "encode", {"text": 3}, "text"),
        ("vae", "decode", {"latents": "x"}, "latents"),
        ("vae", "encode_image", {"image": "x"}, "image"),
        ("vae", "draw", {}, "stage"),
    ):
        with pytest.raises(InvalidInput) as failure:
            standin(component).run(stage, given)
        assert failure.value.field == field
    with pytest.raises(InvalidInput) as failure:
        standin("transformer").start(inputs(steps=0))
    assert failure.value.field == "steps"


@pytest.mark.parametrize("value", ["soon", "-1", "inf", "nan"])
def test_a_wrong_option_is_named(value: str) -> None:
    with pytest.raises(InvalidInput) as failure:
        standin("transformer", step_seconds=value)
    assert failure.value.field == "options.step_seconds"
