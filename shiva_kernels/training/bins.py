# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Ratios in the manner of DiffCR (arXiv 2412.16822): what a learnt budget is compared with.

A number for each block and each quarter of the noise levels. k must be whole, so a training step
runs each block twice, at the tenths below and above its number, and mixes what comes out: the
number's gradient is the difference of the two. Inference takes the nearest tenth, and one forward.

Not DiffCR's: the gate on scores is the study's MOD estimator, which does not scale the forward, and
the numbers are shifted together when they are used, so that their mean is the budget to compare at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shiva_kernels.tables import KTable

BINS, REGIONS = 10, 4


class BinnedRatios(nn.Module):
    """Logits of keep ratios of the prunable blocks, by quarter of the noise levels."""

    def __init__(self, blocks: int, target: float) -> None:
        super().__init__()
        self.target = target
        start = math.log(target / (1 - target))
        self.logit = nn.Parameter(torch.full((REGIONS, blocks - 1), start))

    def logits(self, sigma: Tensor) -> Tensor:
        """(B, blocks - 1) of noise levels sigma (B,) in [0, 1]."""
        region = (sigma * REGIONS).long().clamp(0, REGIONS - 1)
        return self.logit[region]

    def loss(self, ratios: Tensor, weight: float) -> Tensor:
        """The squared distance of a step's mean ratio to the target."""
        return weight * (ratios.mean() - self.target).square()

    @torch.no_grad()
    def table(self, budget: float, sigmas: Sequence[float], tokens: int) -> KTable:
        """Nearest tenths of the ratios, shifted to a mean as near to `budget` as tenths allow."""
        logits = self.logits(torch.tensor(sigmas, device=self.logit.device)).double().cpu()

        def tenths(shift: float) -> Tensor:
            return (torch.sigmoid(logits + shift) * BINS).round().clamp(1, BINS) / BINS

        low, high = -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            below = float(tenths(middle).mean()) < budget
            low, high = (middle, high) if below else (low, middle)
        ratios = min(tenths(low), tenths(high), key=lambda r: abs(float(r.mean()) - budget))
        k = [[min(max(int(tokens * r + 1e-4), 1), tokens) for r in row] for row in ratios.tolist()]
        rows = tuple((tokens, *row) for row in k)
        return KTable(budget, tokens, tuple(sigmas), rows)


def bracketing(ratio: Tensor) -> tuple[float, float, Tensor]:
    """The tenths around a ratio, and how far it lies between them (carries the gradient)."""
    scaled = ratio * BINS
    low = min(math.floor(float(scaled.detach()) + 1e-6), BINS - 1)
    return low / BINS, (low + 1) / BINS, scaled - low
