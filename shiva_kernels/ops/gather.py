# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Take the selected tokens out of a sequence (Shiva-DiT, arXiv 2602.05605, Eq. 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiva_kernels.ops._triton import HAS_TRITON, Launch, tl, triton


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
    """`index` [B, k] as rows of the [B * N, D] view of sequences of `tokens` tokens."""
    first = torch.arange(index.shape[0], device=index.device).mul_(tokens)
    return (index + first[:, None]).flatten()


def gather_torch(x: Tensor, index: Tensor) -> Tensor:
    """`gather_tokens` in plain PyTorch."""
    batch, tokens, width = x.shape
    # Rows of a contiguous matrix are copied whole, which `torch.gather` does element by element.
    rows = x.reshape(batch * tokens, width).index_select(0, flat_rows(index, tokens))
    return rows.view(batch, index.shape[1], width)


@triton.jit
def gather_kernel(
    x, index, out, K, D, stride_b, stride_n, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """BLOCK_D columns of BLOCK_K selected rows of one sequence; the columns of `x` lie densely."""
    b = tl.program_id(2).to(tl.int64)
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(index + b * K + j, mask=j < K, other=0)
    inside = (j < K)[:, None] & (d < D)[None, :]
    values = tl.load(x + b * stride_b + row[:, None] * stride_n + d[None, :], mask=inside)
    tl.store(out + (b * K + j)[:, None] * D + d[None, :], values, mask=inside)


# 4,096 elements a program: each thread has four 16-byte loads of half precision in flight.
LAUNCH = Launch({"BLOCK_K": 8, "BLOCK_D": 512}, num_warps=4)


def gather_triton(x: Tensor, index: Tensor) -> Tensor:
    """`gather_tokens` by the kernel: CUDA tensors, or CPU tensors under Triton's interpreter."""
    x = x if x.stride(2) == 1 else x.contiguous()
    index = index.contiguous()
    (batch, k), width = index.shape, x.shape[2]
    out = x.new_empty(batch, k, width)
    grid = (
        triton.cdiv(k, LAUNCH.blocks["BLOCK_K"]),
        triton.cdiv(width, LAUNCH.blocks["BLOCK_D"]),
        batch,
    )
    if out.numel():
        LAUNCH(gather_kernel, grid, x, index, out, k, width, x.stride(0), x.stride(1))
    return out


@torch.library.custom_op("shiva::gather_tokens", mutates_args=())
def _gather(x: Tensor, index: Tensor) -> Tensor:
    return gather_torch(x, index)


if HAS_TRITON:
    _gather.register_kernel("cuda")(gather_triton)


@_gather.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], index.shape[1], x.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, index = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(index)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    # By its name: gather and scatter are each other's adjoint.
    return torch.ops.shiva.place_tokens(grad, index, ctx.tokens), None


_gather.register_autograd(_autograd, setup_context=_setup_context)
