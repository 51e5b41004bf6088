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

import torch
from torch import Tensor

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


def _forward(scores: Tensor, tau: float) -> Tensor:
    s = scores.to(_ranks_dtype(scores))
    ranks = torch.empty_like(s)
    rows = max(1, _PAIRS // s.shape[1])
    for b in range(s.shape[0]):
        for start in range(0, s.shape[1], rows):
            tile = s[b, start : start + rows, None]
            pairs = (s[b, None, :] - tile).div_(tau).sigmoid_()
            torch.sum(pairs, dim=1, out=ranks[b, start : start + rows])
    return ranks.add_(0.5)


def _backward(grad: Tensor, scores: Tensor, tau: float) -> Tensor:
    s, h = scores.to(grad.dtype), grad
    out = torch.empty_like(s)
    rows = max(1, _PAIRS // s.shape[1])
    for b in range(s.shape[0]):
        # One product gives both row sums: of sigmoid' h_j, and of sigmoid'.
        right = torch.stack([h[b], torch.ones_like(h[b])], dim=1)
        for start in range(0, s.shape[1], rows):
            tile = slice(start, start + rows)
            p = (s[b, None, :] - s[b, tile, None]).div_(tau).sigmoid_()
            with_h, alone = (p.addcmul_(p, p, value=-1) @ right).unbind(1)
            out[b, tile] = with_h - h[b, tile] * alone
    return out.div_(tau).to(scores.dtype)


@torch.library.custom_op("shiva::soft_rank", mutates_args=())
def _soft_rank(scores: Tensor, tau: float) -> Tensor:
    return _forward(scores, tau)


@torch.library.custom_op("shiva::soft_rank_backward", mutates_args=())
def _soft_rank_backward(grad: Tensor, scores: Tensor, tau: float) -> Tensor:
    return _backward(grad, scores, tau)


@_soft_rank.register_fake
def _(scores: Tensor, tau: float) -> Tensor:
    return torch.empty_like(scores, dtype=_ranks_dtype(scores))


@_soft_rank_backward.register_fake
def _(grad: Tensor, scores: Tensor, tau: float) -> Tensor:
    return torch.empty_like(scores)


def _setup_context(ctx, inputs: tuple[Tensor, float], output: Tensor) -> None:
    scores, ctx.tau = inputs
    ctx.save_for_backward(scores)


def _autograd(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (scores,) = ctx.saved_tensors
    return _soft_rank_backward(grad.contiguous(), scores, ctx.tau), None


_soft_rank.register_autograd(_autograd, setup_context=_setup_context)
