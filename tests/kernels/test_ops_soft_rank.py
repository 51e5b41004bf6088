# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Soft rank: the formula, its closed-form gradient, its memory, its registration, its kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import cases, errors
from torch import Tensor

from benchmarks.kernels.soft_rank import naive_soft_rank, saved_bytes
from shiva_kernels.ops import soft_rank


def _scores(batch: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, generator=generator, dtype=dtype)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 700),  # from less than a tile to several of them
    tau=st.floats(0.02, 2),
    seed=st.integers(0, 2**20),
)
def test_values_and_gradients_are_those_of_the_naive_form(batch, tokens, tau, seed):
    scores = _scores(batch, tokens, seed).requires_grad_()
    grad = _scores(batch, tokens, seed + 1)
    ranks, reference = soft_rank(scores, tau), naive_soft_rank(scores, tau)
    torch.testing.assert_close(ranks, reference, rtol=0, atol=1e-10)
    (ours,) = torch.autograd.grad(ranks, scores, grad)
    (theirs,) = torch.autograd.grad(reference, scores, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradient_passes_gradcheck():
    scores = _scores(2, 23).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: soft_rank(s, 0.2), scores)


def test_a_small_temperature_gives_the_ranks_of_a_sort():
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.1]])
    torch.testing.assert_close(soft_rank(scores, 1e-3), torch.tensor([[2.0, 4.0, 1.0, 3.0]]))


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 300), tau=st.floats(0.05, 1), seed=st.integers(0, 2**20))
def test_ranks_average_to_the_middle_and_gradients_to_nothing(tokens, tau, seed):
    scores = _scores(1, tokens, seed).requires_grad_()
    ranks = soft_rank(scores, tau)
    assert float(ranks.detach().mean()) == pytest.approx((tokens + 1) / 2)
    # A shift of all scores changes no rank.
    (grad,) = torch.autograd.grad(ranks, scores, _scores(1, tokens, seed + 1))
    assert float(grad.sum()) == pytest.approx(0, abs=1e-9)


def test_half_precision_is_ranked_in_float32():
    scores = _scores(1, 3000).to(torch.bfloat16).requires_grad_()
    ranks = soft_rank(scores, 0.2)
    assert ranks.dtype == torch.float32
    reference = naive_soft_rank(scores.detach().double(), 0.2)
    torch.testing.assert_close(ranks.detach().double(), reference, rtol=0, atol=2e-3)
    (grad,) = torch.autograd.grad(ranks.square().sum(), scores)
    assert grad.dtype == torch.bfloat16


def test_at_4096_tokens_it_saves_a_twentieth_of_the_naive_form_at_most():
    scores = _scores(1, 4096, dtype=torch.float32).requires_grad_()
    ours, theirs = saved_bytes(soft_rank, scores), saved_bytes(naive_soft_rank, scores)
    assert 0 < ours == scores.nbytes
    assert ours <= 0.05 * theirs


def test_says_what_it_wants():
    with pytest.raises(ValueError, match=r"scores \[B, N\].*\(3,\)"):
        soft_rank(torch.zeros(3), 0.2)
    with pytest.raises(ValueError, match="temperature above 0"):
        soft_rank(torch.zeros(1, 3), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_is_registered_as_torch_wants_it(dtype):
    scores = _scores(2, 9, dtype=dtype).requires_grad_()
    torch.library.opcheck(torch.ops.shiva.soft_rank.default, (scores, 0.2))
    ranks = torch.zeros(2, 9)
    backward = torch.ops.shiva.soft_rank_backward.default
    torch.library.opcheck(backward, (ranks, scores.detach(), 0.2))


@pytest.mark.parametrize("case", cases("soft_rank"))
def test_kernel_gives_the_ranks(case):
    assert errors()[case] <= 1e-4  # of a rank, of up to 203


@pytest.mark.parametrize("case", cases("soft_rank_backward"))
def test_kernel_gives_the_gradient(case):
    assert errors()[case] <= (1e-3 if case.endswith("float16") else 1e-6)
