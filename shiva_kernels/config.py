# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a caller chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from shiva_kernels.artifact import Artifact


class Guidance(StrEnum):
    """What the rows of a call to the transformer are."""

    NONE = "none"  # every row is an image of its own
    PAIR = "pair"  # 2n rows: the n unconditional ones, then the n conditional ones
    SEQUENTIAL = "sequential"  # one branch a call; the first call of a step selects


class PairScore(StrEnum):
    """How the two rows of a pair become one score."""

    MAXIMUM = "maximum"  # Eq. 32
    CONDITIONAL = "conditional"
    MEAN = "mean"


@dataclass(frozen=True)
class KeepMap:
    """What one block kept: row i of `index` (images, k) are the tokens of image i, ascending.

    `block` counts over all the transformer's blocks, `tokens` is their number N.
    """

    sigma: float
    block: int
    tokens: int
    index: torch.Tensor


OnKeep: TypeAlias = Callable[[KeepMap], None]


@dataclass(frozen=True)
class ShivaConfig:
    """What to apply to a transformer.

    artifact: an `Artifact`, its folder, or its repository on the Hugging Face hub.
    budget: mean keep ratio over the prunable blocks and the request's sigma grid, one of those that
        the artifact ships; None keeps every token, bit for bit.
    pipeline: whose scheduler and guidance to follow where a call enters no `request`; without one,
        tables are of the artifact's own sigma grid.
    guidance: what the rows of calls are that enter no `request`; None asks the pipeline, and
        refuses a batch that could be pairs or images.
    pair_score: how guidance pairs are scored.
    keep_dense: hold a copy of the weights that the artifact's adapter changes (on the CPU), so that
        `remove` gives the user's own dense bits back. A server that loads again instead saves it.
    on_keep: called with a `KeepMap` by every pruned block.
    revision: of the hub's repository.
    """

    artifact: Artifact | str | Path
    budget: float | None
    pipeline: Any = None
    guidance: Guidance | None = None
    pair_score: PairScore = PairScore.MAXIMUM
    keep_dense: bool = True
    on_keep: OnKeep | None = None
    revision: str | None = None
