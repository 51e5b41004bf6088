# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Take the selected tokens out of a sequence (Shiva-DiT, arXiv 2602.05605, Eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The rows `index` of each sequence: `out[b, j] = x[b, index[b, j]]`.

    `x` is [B, N, D], `index` int64 [B, k] in [0, N), distinct within a row, as top-k gives them
    (the gradient is written, not added up); the result is [B, k, D], contiguous.
    """
    if x.dim() != 3 or index.dim() != 2 or x.shape[0] != index.shape[0]:
        raise ValueError(
            "gather_tokens wants x [B, N, D] and index [B, k], and got the shapes "
            f"{tuple(x.shape)} and {tuple(index.shape)}"
        )
    return _gather(x, index)


def flat_rows(index: Tensor, tokens: int) -> Tensor:
    """`index` [B, k] as rows of the [B * N, D] view of a sequence of `tokens` tokens."""
    first = torch.arange(index.shape[0], device=index.device).mul_(tokens)
    return (index + first[:, None]).flatten()


@torch.library.custom_op("shiva::gather_tokens", mutates_args=())
def _gather(x: Tensor, index: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    # Rows of a contiguous matrix are copied whole, which `torch.gather` does element by element.
    rows = x.reshape(batch * tokens, width).index_select(0, flat_rows(index, tokens))
    return rows.view(batch, index.shape[1], width)


@torch.library.custom_op("shiva::gather_tokens_backward", mutates_args=())
def _gather_backward(grad: Tensor, index: Tensor, tokens: int) -> Tensor:
    batch, _, width = grad.shape
    out = grad.new_zeros(batch, tokens, width)
    out.view(-1, width).index_copy_(0, flat_rows(index, tokens), grad.reshape(-1, width))
    return out


@_gather.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], index.shape[1], x.shape[2])


@_gather_backward.register_fake
def _(grad: Tensor, index: Tensor, tokens: int) -> Tensor:
    return grad.new_empty(grad.shape[0], tokens, grad.shape[2])


def _setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, index = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(index)


def _autograd(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return _gather_backward(grad, index, ctx.tokens), None


_gather.register_autograd(_autograd, setup_context=_setup_context)
