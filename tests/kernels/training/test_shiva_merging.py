# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Token merging, the untrained rival."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_student import CHANNELS, SIDE, RandomSource, tiny_transformer

from shiva_kernels.errors import Unsupported
from shiva_kernels.training.merging import match, merged


@settings(deadline=None)
@given(k=st.integers(16, 64), seed=st.integers(0, 100))
def test_every_token_has_an_owner_and_keeps_the_mean(k: int, seed: int) -> None:
    x = torch.randn(2, 64, 5, generator=torch.Generator().manual_seed(seed))
    merging = match(x, k, side=8)
    assert merging.kept.shape == (2, k)
    assert all(len(set(row.tolist())) == k for row in merging.kept)
    counts = torch.stack([row.bincount(minlength=k) for row in merging.owner])
    assert counts.min() >= 1
    weighted = (merging.merge(x) * counts[..., None]).sum(1)
    assert torch.allclose(weighted, x.sum(1), atol=1e-4)


def test_nothing_merged_is_a_permutation() -> None:
    x = torch.randn(1, 64, 3)
    merging = match(x, 64, side=8)
    assert torch.equal(merging.spread(merging.merge(x)), x)


def test_equal_tokens_are_merged_first() -> None:
    x = torch.randn(1, 16, 6)
    x[0, 1] = x[0, 0]  # token 0 is a destination, 1 its neighbour
    merging = match(x, 15, side=4)
    assert merging.owner[0, 1] == merging.owner[0, 0]
    assert torch.allclose(merging.merge(x)[0, merging.owner[0, 0]], x[0, 0])


def test_destinations_cannot_be_merged() -> None:
    with pytest.raises(Unsupported, match="leaves 16"):
        match(torch.randn(1, 64, 3), 15, side=8)


def test_the_transformer_is_itself_again_afterwards() -> None:
    transformer, batch = tiny_transformer(), RandomSource().batch(0, 1)
    x, time = torch.randn(1, CHANNELS, SIDE, SIDE), torch.tensor([500.0])

    def run() -> torch.Tensor:
        with torch.no_grad():
            return transformer(x, batch.context, batch.pooled, time).sample

    before = run()
    with merged(transformer, 1.0):
        whole = run()
    with merged(transformer, 0.5):
        half = run()
    assert torch.allclose(whole, before, atol=1e-5)
    assert not torch.allclose(half, before, atol=1e-3)
    assert torch.equal(run(), before)
