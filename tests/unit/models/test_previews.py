# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A picture of latents can be drawn of whatever a denoiser may hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kubediffusion.models.preview import picture_of


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (24, 8), (1, 1), (1, 40)])
def test_it_has_the_picture_s_shape(channels: int, height: int, width: int) -> None:
    image = picture_of(latents(1, channels, height, width))
    times = 128 // max(height, width)
    assert image.shape == (height * times, width * times, 3)
    assert image.dtype == np.uint8


def test_what_differs_in_the_latents_differs_in_the_picture() -> None:
    x = torch.zeros(1, 16, 32, 32)
    x[:, 3, :, 16:] = 2.0
    image = picture_of(x + 0.01 * latents(1, 16, 32, 32))
    left, right = image[:, :64].mean((0, 1)), image[:, 64:].mean((0, 1))
    assert np.abs(left - right).max() > 60


def test_equal_latents_have_equal_pictures_and_small_changes_small_ones() -> None:
    x = latents(1, 16, 32, 32) * torch.arange(1, 17).view(1, 16, 1, 1)
    first = picture_of(x)
    assert np.array_equal(first, picture_of(x.clone()))
    second = picture_of(x + 1e-3 * latents(1, 16, 32, 32).flip(2))
    assert np.abs(first.astype(int) - second).mean() < 4


@pytest.mark.parametrize("value", [0.0, 3.0, float("nan"), float("inf"), -float("inf"), 3e38])
def test_constant_and_broken_latents_still_have_a_picture(value: float) -> None:
    whole = picture_of(torch.full((1, 16, 16, 16), value))
    assert whole.shape == (128, 128, 3)
    part = latents(1, 16, 16, 16)
    part[0, 5, 3, 3] = value
    assert picture_of(part).std() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_drawn(dtype: torch.dtype) -> None:
    assert picture_of(latents(1, 16, 16, 16).to(dtype)).std() > 0


def test_a_very_large_picture_is_drawn_at_its_own_size() -> None:
    # More than the 16 million numbers that torch.quantile takes.
    assert picture_of(latents(1, 3, 2400, 2400)).shape == (2400, 2400, 3)
