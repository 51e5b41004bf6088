# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Soft descending ranks of scores (Shiva-DiT, arXiv 2602.05605, Eq. 5), in O(N) memory.

    r_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / tau)

Autograd through this formula would keep N x N sigmoids for each layer. The gradient has a closed
form that needs the scores alone. With h_i = dL/dr_i and sigmoid' = sigmoid (1 - sigmoid), which is
even in its argument:

    dL/ds_m = (1 / tau) sum_j sigmoid'((s_m - s_j) / tau) (h_j - h_m)

so forward and backward both walk over tiles of pairs and keep nothing but their row sums. The
diagonal needs no mask: it adds sigmoid(0) = 1/2 to every rank and nothing to a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shiva_kernels.ops._triton import HAS_TRITON, Launch, tl, triton

# Pairs a tile on a CPU: half a megabyte of float32, to stay in the L2 cache.
_PAIRS = 1 << 17


def soft_rank(scores: Tensor, tau: float) -> Tensor:
    """Soft descending ranks: about 1 for the highest score of a row, about N for the lowest.

    `scores` is [B, N]; the result is [B, N] in float32 (float64 for float64 scores). The mean of a
    row is (N + 1) / 2 whatever the scores are. `tau` > 0, in units of the scores, says how far two
    scores must lie apart to count as ordered. Eq. 5 of arXiv 2602.05605.
    """
    if scores.dim() != 2:
        raise ValueError(f"soft_rank wants scores [B, N], and got the shape {tuple(scores.shape)}")
    if tau <= 0:
        raise ValueError(f"soft_rank wants a temperature above 0, and got tau={tau}")
    return _soft_rank(scores, tau)


def _ranks_dtype(scores: Tensor) -> torch.dtype:
    """Half precision cannot count beyond 2048: ranks are float32 at least."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _tiles(scaled: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Row, tile of it, and sigmoid(s_j - s_i) for all j and each i of the tile; scores over tau.

    All tiles lie in one buffer, each over the last: fresh memory for each costs as much again.
    """
    batch, tokens = scaled.shape
    rows = min(max(1, _PAIRS // tokens), tokens)
    buffer = scaled.new_empty(rows, tokens)
    for b in range(batch):
        for start in range(0, tokens, rows):
            tile = slice(start, min(start + rows, tokens))
            pairs = buffer[: tile.stop - start]
            torch.sub(scaled[b, None, :], scaled[b, tile, None], out=pairs)
            yield b, tile, pairs.sigmoid_()


def _forward_torch(scores: Tensor, tau: float) -> Tensor:
    scaled = scores.to(_ranks_dtype(scores)) / tau
    ranks = torch.empty_like(scaled)
    for b, tile, pairs in _tiles(scaled):
        torch.sum(pairs, dim=1, out=ranks[b, tile])
    return ranks.add_(0.5)


def _backward_torch(grad: Tensor, scores: Tensor, tau: float) -> Tensor:
    scaled, h = scores.to(grad.dtype) / tau, grad
    # One product gives both row sums: of sigmoid' h_j, and of sigmoid'.
    right = torch.stack([h, torch.ones_like(h)], dim=2)
    out = torch.empty_like(scaled)
    for b, tile, p in _tiles(scaled):
        with_h, alone = (p.addcmul_(p, p, value=-1) @ right[b]).unbind(1)
        torch.addcmul(with_h, h[b, tile], alone, value=-1, out=out[b, tile])
    return out.div_(tau).to(scores.dtype)


@triton.jit
def soft_rank_kernel(scores, ranks, N, tau, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ranks of BLOCK_M scores of one row against all N, BLOCK_N at a time; float32 inside."""
    row = tl.program_id(1).to(tl.int64) * N
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = 1.0 / tau
    s_i = tl.load(scores + row + i, mask=i < N, other=0.0).to(tl.float32)
    # Summed across threads once, at the end.
    above = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        # What lies beyond the row is infinitely worse, and so adds nothing.
        s_j = tl.load(scores + row + j, mask=j < N, other=float("-inf")).to(tl.float32)
        above += tl.sigmoid((s_j[None, :] - s_i[:, None]) * scale)
    tl.store(ranks + row + i, tl.sum(above, 1) + 0.5, mask=i < N)


@triton.jit
def soft_rank_backward_kernel(
    grad, scores, out, N, tau, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dL/ds of BLOCK_M scores of one row from dL/dr of all N; float32 inside."""
    row = tl.program_id(1).to(tl.int64) * N
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = 1.0 / tau
    s_i = tl.load(scores + row + i, mask=i < N, other=0.0).to(tl.float32)
    h_i = tl.load(grad + row + i, mask=i < N, other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        s_j = tl.load(scores + row + j, mask=j < N, other=float("-inf")).to(tl.float32)
        h_j = tl.load(grad + row + j, mask=j < N, other=0.0)
        # sigmoid' is even: of minus the distance, so that nothing cancels in 1 - sigmoid.
        e = tl.exp(-tl.abs(s_j[None, :] - s_i[:, None]) * scale)
        total += e / ((1 + e) * (1 + e)) * (h_j[None, :] - h_i[:, None])
    result = tl.sum(total, 1) * scale
    tl.store(out + row + i, result.to(out.dtype.element_ty), mask=i < N)


# Not tuned on a GPU. In registers (docs/kernels.md) at least half of the warps fit, and one row of
# 4,096 scores makes 256 programs.
LAUNCH = Launch({"BLOCK_M": 16, "BLOCK_N": 128}, num_warps=4)


def _grid(scores: Tensor) -> tuple[int, int]:
    return triton.cdiv(scores.shape[1], LAUNCH.blocks["BLOCK_M"]), scores.shape[0]


def forward_triton(scores: Tensor, tau: float) -> Tensor:
    """`soft_rank` by the kernel: CUDA tensors, or CPU tensors under Triton's interpreter."""
    scores = scores.contiguous()
    ranks = torch.empty_like(scores, dtype=torch.float32)
    LAUNCH(soft_rank_kernel, _grid(scores), scores, ranks, scores.shape[1], tau)
    return ranks


def backward_triton(grad: Tensor, scores: Tensor, tau: float) -> Tensor:
    """The gradient of `soft_rank` by the kernel: float32 `grad` [B, N]; in the scores' dtype."""
    grad, scores = grad, scores.contiguous()
    out = torch.empty_like(scores)
    LAUNCH(soft_rank_backward_kernel, _grid(scores), grad, scores, out, scores.shape[1], tau)
    return out


@torch.library.custom_op("shiva::soft_rank", mutates_args=())
def _soft_rank(scores: Tensor, tau: float) -> Tensor:
    return _forward_torch(scores, tau)


@torch.library.custom_op("shiva::soft_rank_backward", mutates_args=())
def _soft_rank_backward(grad: Tensor, scores: Tensor, tau: float) -> Tensor:
    return _backward_torch(grad, scores, tau)


if HAS_TRITON:

    @_soft_rank.register_kernel("cuda")
    def _(scores: Tensor, tau: float) -> Tensor:
        exact = scores.dtype == torch.float64  # which only checks of gradients use
        return _forward_torch(scores, tau) if exact else forward_triton(scores, tau)

    @_soft_rank_backward.register_kernel("cuda")
    def _(grad: Tensor, scores: Tensor, tau: float) -> Tensor:
        exact = scores.dtype == torch.float64
        return (_backward_torch if exact else backward_triton)(grad, scores, tau)


@_soft_rank.register_fake
def _(scores: Tensor, tau: float) -> Tensor:
    return torch.empty_like(scores, dtype=_ranks_dtype(scores))


@_soft_rank_backward.register_fake
def _(grad: Tensor, scores: Tensor, tau: float) -> Tensor:
    return torch.empty_like(scores)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    scores, ctx.tau = inputs
    ctx.save_for_backward(scores)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (scores,) = ctx.saved_tensors
    return _soft_rank_backward(grad, scores, ctx.tau), None


_soft_rank.register_autograd(_autograd, setup_context=_setup_context)
