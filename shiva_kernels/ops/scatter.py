# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Write a block's output for the selected tokens back into the residual stream.

Tokens that were not selected keep what they were: the identity skip of Shiva-DiT (arXiv
2602.05605). Three operations share one kernel, because they are what autograd makes of one another:

    scatter_tokens   x with rows replaced by y
    zero_tokens      x with rows replaced by zeros: a scatter's gradient in x
    place_tokens     zeros with rows replaced by y: a gather's gradient
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiva_kernels.ops._triton import HAS_TRITON, Launch, tl, triton
from shiva_kernels.ops.gather import flat_rows, gather_tokens


def scatter_tokens(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    """A copy of `x` with rows replaced: `out[b, index[b, j]] = y[b, j]`.

    `x` is [B, N, D], `index` int64 [B, k] in [0, N), distinct within a row, `y` [B, k, D] of the
    same dtype as `x`; the result is [B, N, D], contiguous. No gradient reaches the rows of `x` that
    were replaced.
    """
    if x.dim() != 3 or y.shape != (*index.shape, x.shape[2]) or x.shape[0] != y.shape[0]:
        raise ValueError(
            "scatter_tokens wants x [B, N, D], index [B, k] and y [B, k, D], and got the shapes "
            f"{tuple(x.shape)}, {tuple(index.shape)} and {tuple(y.shape)}"
        )
    if x.dtype != y.dtype:
        raise ValueError(f"scatter_tokens wants x and y of one dtype, and got {x.dtype}, {y.dtype}")
    return _scatter(x, index, y)


def write_rows_torch(out: Tensor, index: Tensor, y: Tensor | None) -> Tensor:
    """Rows `index` of the contiguous `out` [B, N, D] become `y` [B, k, D], or zero; in place."""
    rows, flat = flat_rows(index, out.shape[1]), out.view(-1, out.shape[2])
    if y is None:
        flat.index_fill_(0, rows, 0)
    else:
        flat.index_copy_(0, rows, y.reshape(-1, out.shape[2]))
    return out


@triton.jit
def scatter_kernel(
    out,
    index,
    y,
    N,
    K,
    D,
    stride_b,
    stride_k,
    HAS_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of BLOCK_K selected rows of one sequence; the columns of `y` lie densely."""
    b = tl.program_id(2).to(tl.int64)
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(index + b * K + j, mask=j < K, other=0)
    inside = (j < K)[:, None] & (d < D)[None, :]
    values = tl.zeros([BLOCK_K, BLOCK_D], out.dtype.element_ty)
    if HAS_Y:
        source = b * stride_b + j[:, None].to(tl.int64) * stride_k + d[None, :]
        values = tl.load(y + source, mask=inside)
    tl.store(out + (b * N + row)[:, None] * D + d[None, :], values, mask=inside)


# 4,096 elements a program: each thread has four 16-byte loads of half precision in flight.
LAUNCH = Launch({"BLOCK_K": 8, "BLOCK_D": 512}, num_warps=4)


def write_rows_triton(out: Tensor, index: Tensor, y: Tensor | None) -> Tensor:
    """`write_rows_torch` by the kernel: CUDA tensors, or CPU tensors under the interpreter."""
    index = index.contiguous()
    (batch, k), (_, tokens, width) = index.shape, out.shape
    source = out if y is None else y if y.stride(2) == 1 else y.contiguous()
    grid = (
        triton.cdiv(k, LAUNCH.blocks["BLOCK_K"]),
        triton.cdiv(width, LAUNCH.blocks["BLOCK_D"]),
        batch,
    )
    if k * width * batch:
        sizes = (tokens, k, width, source.stride(0), source.stride(1), y is not None)
        LAUNCH(scatter_kernel, grid, out, index, source, *sizes)
    return out


def _write_rows(out: Tensor, index: Tensor, y: Tensor | None) -> Tensor:
    write = write_rows_triton if HAS_TRITON and out.is_cuda else write_rows_torch
    return write(out, index, y)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("shiva::scatter_tokens", mutates_args=())
def _scatter(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    return _write_rows(_copy(x), index, y)


@torch.library.custom_op("shiva::zero_tokens", mutates_args=())
def _zero(x: Tensor, index: Tensor) -> Tensor:
    return _write_rows(_copy(x), index, None)


@torch.library.custom_op("shiva::place_tokens", mutates_args=())
def _place(y: Tensor, index: Tensor, tokens: int) -> Tensor:
    return _write_rows(y.new_zeros(y.shape[0], tokens, y.shape[2]), index, y)


@_scatter.register_fake
def _(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_zero.register_fake
def _(x: Tensor, index: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_place.register_fake
def _(y: Tensor, index: Tensor, tokens: int) -> Tensor:
    return y.new_empty(y.shape[0], tokens, y.shape[2])


def _save_index(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _scatter_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    (index,) = ctx.saved_tensors
    to_x, _, to_y = ctx.needs_input_grad
    return (
        _zero(grad, index) if to_x else None,
        None,
        gather_tokens(grad, index) if to_y else None,
    )


def _zero_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _zero(grad, *ctx.saved_tensors), None


def _place_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return gather_tokens(grad, *ctx.saved_tensors), None, None


_scatter.register_autograd(_scatter_autograd, setup_context=_save_index)
_zero.register_autograd(_zero_autograd, setup_context=_save_index)
_place.register_autograd(_place_autograd, setup_context=_save_index)
