# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which tokens a block keeps: hard top-k of standardised scores (Eq. 3), and scores of a pair."""

from __future__ import annotations

import torch

from shiva_kernels.config import Guidance, PairScore
from shiva_kernels.errors import Unsupported

_EPS = 1e-6


def standardise(scores: torch.Tensor) -> torch.Tensor:
    """(B, N) with mean 0 and deviation 1 over the tokens of each row, in float32.

    Top-k does not see scale and offset of a row, so training leaves them free; the temperatures of
    the soft rank and the score noise need them fixed.
    """
    scores = scores.float()
    centred = scores - scores.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True).sqrt() + _EPS)


def scores_of_images(
    scores: torch.Tensor, guidance: Guidance, pair_score: PairScore
) -> torch.Tensor:
    """(B, N) standardised scores of a call's rows -> (images, N).

    Both branches of a guidance pair must keep the same tokens, or their difference is not guidance
    (Eq. 32). The branches are standardised before they meet, because nothing in training ties the
    scale of one to the other's. Raises Unsupported for a batch that is no batch of pairs.
    """
    if guidance is not Guidance.PAIR:
        return scores
    if scores.shape[0] % 2:
        raise Unsupported(
            f"guidance pairs need an even batch, not {scores.shape[0]} rows; "
            "pass Guidance.NONE or Guidance.SEQUENTIAL"
        )
    unconditional, conditional = scores.chunk(2)
    if pair_score is PairScore.MAXIMUM:
        return torch.maximum(unconditional, conditional)
    if pair_score is PairScore.MEAN:
        return (unconditional + conditional) / 2
    return conditional


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (B, k), ascending, of the k best of (B, N); of equal scores the earlier token.

    A stable sort instead of `torch.topk`, whose choice among equals depends on device and shape.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values


def kept_mask(index: torch.Tensor, tokens: int) -> torch.Tensor:
    """(B, tokens) bool of indices (B, k)."""
    mask = torch.zeros(index.shape[0], tokens, dtype=torch.bool, device=index.device)
    return mask.scatter_(1, index, True)
