# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for `shiva_kernels.ops` and `shiva_kernels.estimators` until they are merged."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch


def soft_rank(scores: torch.Tensor, tau: float) -> torch.Tensor:
    difference = (scores[:, None, :] - scores[:, :, None]) / tau
    return 0.5 + torch.sigmoid(difference).sum(-1)


def gather_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def scatter_tokens(x: torch.Tensor, index: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.scatter(1, index[..., None].expand(-1, -1, x.shape[-1]), y)


class Estimator(StrEnum):
    RESIDUAL = "residual"
    MOD = "mod"
    STRAIGHT_THROUGH = "straight_through"
    THRESHOLD = "threshold"
    BENEFIT = "benefit"


@dataclass(frozen=True)
class Surrogate:
    estimator: Estimator = Estimator.RESIDUAL
    tau_rank: float = 0.2
    tau_sel: float = 0.1


def soft_selection(scores: torch.Tensor, k: torch.Tensor, surrogate: Surrogate) -> torch.Tensor:
    rank = soft_rank(scores, surrogate.tau_rank)
    return torch.sigmoid((k - rank) / (surrogate.tau_sel * scores.shape[1]))


def gate_input(
    x: torch.Tensor, pi: torch.Tensor, kept: torch.Tensor, estimator: Estimator
) -> torch.Tensor:
    if estimator is not Estimator.RESIDUAL:
        return x
    d = pi - pi.detach()
    return torch.where(kept, 1 + d, 1 - d)[..., None] * x


def gate_output(
    x: torch.Tensor,
    y: torch.Tensor,
    pi: torch.Tensor,
    kept: torch.Tensor,
    estimator: Estimator,
    teacher_delta: torch.Tensor | None = None,
) -> torch.Tensor:
    return y
