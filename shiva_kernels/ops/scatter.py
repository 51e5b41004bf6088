# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Write a block's output for the selected tokens back into the residual stream.

Tokens that were not selected keep what they were: the identity skip of Shiva-DiT (arXiv
2602.05605, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiva_kernels.ops.gather import flat_rows, gather_tokens


def scatter_tokens(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    """A copy of `x` with rows replaced: `out[b, index[b, j]] = y[b, j]`.

    `x` is [B, N, D], `index` int64 [B, k] in [0, N), distinct within a row, `y` [B, k, D] of the
    same dtype as `x`; the result is [B, N, D]. No gradient reaches the rows of `x` that were
    replaced.
    """
    if x.dim() != 3 or y.shape != (*index.shape, x.shape[2]) or x.shape[0] != y.shape[0]:
        raise ValueError(
            "scatter_tokens wants x [B, N, D], index [B, k] and y [B, k, D], and got the shapes "
            f"{tuple(x.shape)}, {tuple(index.shape)} and {tuple(y.shape)}"
        )
    if x.dtype != y.dtype:
        raise ValueError(f"scatter_tokens wants x and y of one dtype, and got {x.dtype}, {y.dtype}")
    return _scatter(x, index, y)


@torch.library.custom_op("shiva::scatter_tokens", mutates_args=())
def _scatter(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    rows = flat_rows(index, x.shape[1])
    out.view(-1, x.shape[2]).index_copy_(0, rows, y.reshape(-1, x.shape[2]))
    return out


@torch.library.custom_op("shiva::zero_tokens", mutates_args=())
def _zero(x: Tensor, index: Tensor) -> Tensor:
    """A copy of `x` with the rows `index` zero: what reaches `x` of a scatter's gradient."""
    out = x.clone(memory_format=torch.contiguous_format)
    out.view(-1, x.shape[2]).index_fill_(0, flat_rows(index, x.shape[1]), 0)
    return out


@_scatter.register_fake
def _(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_zero.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _autograd(ctx, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    (index,) = ctx.saved_tensors
    to_x, _, to_y = ctx.needs_input_grad
    return (
        _zero(grad, index) if to_x else None,
        None,
        gather_tokens(grad, index) if to_y else None,
    )


_scatter.register_autograd(_autograd, setup_context=_setup_context)
