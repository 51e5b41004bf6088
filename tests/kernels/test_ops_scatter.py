# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Scattering tokens into the residual stream: values, gradients, registration, kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import cases, errors
from torch import Tensor

from shiva_kernels.ops import gather_tokens, scatter_tokens


def _tokens(
    batch: int, tokens: int, width: int, k: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)
    y = torch.randn(batch, k, width, generator=generator, dtype=torch.float64)
    order = torch.rand(batch, tokens, generator=generator).argsort(dim=1)
    return x.requires_grad_(), order[:, :k], y.requires_grad_()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.data())
def test_values_and_gradients_are_those_of_torch_scatter(batch, tokens, width, data):
    k = data.draw(st.integers(0, tokens))
    x, index, y = _tokens(batch, tokens, width, k, data.draw(st.integers(0, 999)))
    ours = scatter_tokens(x, index, y)
    theirs = x.scatter(1, index[..., None].expand(-1, -1, width), y)
    assert torch.equal(ours, theirs)
    grad = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(o, (x, y), grad) for o in (ours, theirs)), strict=True):
        assert torch.equal(a, b)


def test_gradient_passes_gradcheck_twice():
    arguments = _tokens(2, 9, 3, 4, 0)
    assert torch.autograd.gradcheck(scatter_tokens, arguments)
    assert torch.autograd.gradgradcheck(scatter_tokens, arguments)


def test_its_arguments_stay_as_they_are():
    x, index, y = (t.detach() for t in _tokens(1, 5, 2, 3, 0))
    before = x.clone(), y.clone()
    out = scatter_tokens(x, index, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_gathering_what_was_scattered_gives_it_back():
    x, index, y = _tokens(2, 11, 4, 6, 1)
    assert torch.equal(gather_tokens(scatter_tokens(x, index, y), index), y)


def test_says_what_it_wants():
    x, index, y = _tokens(1, 5, 2, 3, 0)
    with pytest.raises(ValueError, match=r"y \[B, k, D\].*\(1, 2, 2\)"):
        scatter_tokens(x, index, y[:, :2])
    with pytest.raises(ValueError, match=r"one dtype.*float64.*float32"):
        scatter_tokens(x, index, y.float())


def test_is_registered_as_torch_wants_it():
    x, index, y = _tokens(2, 9, 3, 4, 0)
    torch.library.opcheck(torch.ops.shiva.scatter_tokens.default, (x, index, y))
    torch.library.opcheck(torch.ops.shiva.zero_tokens.default, (x, index))
    torch.library.opcheck(torch.ops.shiva.place_tokens.default, (y, index, 9))


@pytest.mark.parametrize("case", cases("scatter"))
def test_kernel_gives_the_same_bits(case):
    assert errors()[case] == 0
