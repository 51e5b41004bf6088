# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The ratio policy (Eq. 10-11) and the budget's loss (Eq. 12-13).

    logit(r[t,l]) = time(t) + layer(l) + anchor,   r = sigmoid(logit),   k = floor(N r)

The two branches are added, not multiplied: what is redundant over time is much the same at every
depth. The policy sees no input, so it becomes a look-up (`tables.RatioCurve`) when training ends.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from shiva_kernels.tables import RatioCurve

HIDDEN = 256


class RatioPolicy(nn.Module):
    """Keep ratios of the prunable blocks (all but block 0) at a noise level."""

    def __init__(self, blocks: int, target: float = 0.6) -> None:
        super().__init__()
        self.blocks = blocks
        self.layer_embedding = nn.Embedding(blocks - 1, HIDDEN)
        self.layer = _branch()
        self.time = _branch()
        self.anchor = nn.Parameter(torch.tensor(math.log(target / (1 - target))))
        # Both branches start at 0, so that the first ratios are the target.
        for branch in (self.layer, self.time):
            for parameter in branch[-1].parameters():
                nn.init.zeros_(parameter)

    def logits(self, sigma: torch.Tensor) -> torch.Tensor:
        """(B, blocks - 1) of noise levels sigma (B,) in [0, 1]."""
        time = self.time(_sinusoid(sigma))
        return time + self.layer(self.layer_embedding.weight).T + self.anchor

    def forward(self, sigma: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
        """Ratios (B, blocks - 1) in (0, 1). `noise` is the deviation of Eq. 29 on the logits."""
        logits = self.logits(sigma)
        if noise:
            logits = logits + noise * torch.randn_like(logits)
        return torch.sigmoid(logits)

    @torch.no_grad()
    def curve(self, nodes: int = 65) -> RatioCurve:
        """The policy as a look-up over `nodes` noise levels; the anchor lies in the time branch."""
        sigmas = torch.linspace(0, 1, nodes, device=self.anchor.device)
        time = self.time(_sinusoid(sigmas))[:, 0] + self.anchor
        layer = self.layer(self.layer_embedding.weight)[:, 0]
        return RatioCurve(tuple(time.double().tolist()), tuple(layer.double().tolist()))


class BudgetLoss(nn.Module):
    """Holds the mean keep ratio at a target over time, not in each batch (Eq. 12-13).

        mu <- beta mean(r) + (1 - beta) mu,      loss = weight mean(r) sg[2 (mu - target)]

    mu starts at the target and is the mean over all ranks; the loss is of this rank's ratios, so
    that data-parallel averaging of gradients gives the gradient of the mean over ranks. The average
    is a buffer: it is saved with a checkpoint.
    """

    mu: torch.Tensor

    def __init__(self, target: float, weight: float = 1.0, beta: float = 0.2) -> None:
        super().__init__()
        self.target, self.weight, self.beta = target, weight, beta
        self.register_buffer("mu", torch.tensor(target))

    def forward(self, ratios: torch.Tensor) -> torch.Tensor:
        """`ratios`: of the prunable blocks, any shape. Updates mu. Returns a scalar."""
        own = ratios.mean()
        mean = own.detach().clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.mu.mul_(1 - self.beta).add_(self.beta * mean)
        return self.weight * own * (2 * (self.mu - self.target)).detach()


def _branch() -> nn.Sequential:
    return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 1))


def _sinusoid(sigma: torch.Tensor) -> torch.Tensor:
    """(B, HIDDEN) of sigma (B,), on the usual scale of 1000 timesteps."""
    half = HIDDEN // 2
    exponent = torch.arange(half, device=sigma.device, dtype=torch.float32) / half
    angles = 1000 * sigma.float()[:, None] * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
