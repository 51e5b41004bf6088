# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A request's random numbers go from stage to stage."""

from __future__ import annotations

import pytest
import torch

from kubediffusion.errors import InvalidInput
from kubediffusion.models.random import generator_of, state_of


def test_a_generator_goes_on_where_its_state_was_taken() -> None:
    first = generator_of(2**64 - 1)
    torch.randn(7, generator=first)
    second = generator_of(state_of(first))
    assert torch.equal(torch.randn(5, generator=first), torch.randn(5, generator=second))
    assert state_of(first).dtype == torch.uint8


@pytest.mark.parametrize("seed", [None, True, 1.5, "7", 2**64, -(2**63) - 1])
def test_what_is_no_seed_is_refused(seed: object) -> None:
    with pytest.raises(InvalidInput) as failure:
        generator_of(seed)
    assert failure.value.field == "seed"


@pytest.mark.parametrize("state", [torch.zeros(3, dtype=torch.uint8), torch.zeros(0)])
def test_what_is_no_state_of_a_generator_is_refused(state: torch.Tensor) -> None:
    with pytest.raises(InvalidInput) as failure:
        generator_of(state)
    assert failure.value.field == "generator"
