# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Distillation of features; the budget's loss is `shiva_kernels.policy.BudgetLoss`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def normalized_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared distance of layer-normalised features, [B, N, D] each (Eq. 31).

    The normalisation has no weights: it takes the magnitude out, so that a block whose features are
    large does not outweigh the rest. The mean over tokens, channels and blocks, where the paper has
    a sum: so the weight does not depend on the resolution.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(f"features of {len(student)} student and {len(teacher)} teacher blocks")
    terms = [
        functional.mse_loss(_normalized(mine), _normalized(wanted))
        for mine, wanted in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean()


def _normalized(features: Tensor) -> Tensor:
    return functional.layer_norm(features.float(), features.shape[-1:])
