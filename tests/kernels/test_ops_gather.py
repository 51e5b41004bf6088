# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Gathering tokens: values, gradients, registration, kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import cases, errors
from torch import Tensor

from shiva_kernels.ops import gather_tokens


def _tokens(batch: int, tokens: int, width: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)
    order = torch.rand(batch, tokens, generator=generator).argsort(dim=1)
    return x, order[:, :k]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.data())
def test_values_and_gradients_are_those_of_torch_gather(batch, tokens, width, data):
    k = data.draw(st.integers(0, tokens))
    x, index = _tokens(batch, tokens, width, k, data.draw(st.integers(0, 999)))
    x.requires_grad_()
    ours = gather_tokens(x, index)
    theirs = x.gather(1, index[..., None].expand(-1, -1, width))
    assert torch.equal(ours, theirs)
    assert ours.is_contiguous()
    grad = torch.randn_like(ours)
    assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (ours, theirs)))


def test_gradient_passes_gradcheck_twice():
    x, index = _tokens(2, 9, 3, 4, 0)
    x.requires_grad_()
    assert torch.autograd.gradcheck(gather_tokens, (x, index))
    assert torch.autograd.gradgradcheck(gather_tokens, (x, index))


def test_reads_a_window_into_a_longer_sequence():
    joint = torch.randn(2, 12, 4)
    index = torch.tensor([[3, 0], [1, 2]])
    assert torch.equal(gather_tokens(joint[:, 2:8], index)[1], joint[1, [3, 4]])


def test_an_index_outside_is_an_error():
    with pytest.raises(IndexError):
        gather_tokens(torch.zeros(1, 3, 2), torch.tensor([[3]]))


def test_says_what_it_wants():
    with pytest.raises(ValueError, match=r"index \[B, k\].*\(2, 3, 4\) and \(1, 2\)"):
        gather_tokens(torch.zeros(2, 3, 4), torch.zeros(1, 2, dtype=torch.int64))


def test_is_registered_as_torch_wants_it():
    x, index = _tokens(2, 9, 3, 4, 0)
    torch.library.opcheck(torch.ops.shiva.gather_tokens.default, (x.requires_grad_(), index))
    torch.library.opcheck(torch.ops.shiva.gather_tokens.default, (x.half(), index))


@pytest.mark.parametrize("case", cases("gather"))
def test_kernel_gives_the_same_bits(case):
    assert errors()[case] == 0
