# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How many tokens each block keeps at each step: pure arithmetic, no torch.

A *curve* is what the ratio policy has learnt (Eq. 10), made a look-up: a logit over the noise level
and one over depth, added. A *budget* is the mean keep ratio over the prunable blocks (block 0 is
dense and not counted) and over the request's whole sigma grid. From both follows a *table*,
k[step][block]: the curve shifted by the one number that makes its mean the budget, then rounded to
whole groups of tokens without losing the mean.

Sigma is the noise level in [0, 1], 1 being pure noise: a flow-matching scheduler's sigma, or the
timestep over 1000 of a discrete one. A table is of the full grid; image-to-image and a resumed
request look their rows up by sigma, and so keep fewer rows of the same table.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from shiva_kernels.errors import ShivaError

# Logits beyond this keep all or nothing in float64; shifts are searched between.
_MAX_SHIFT = 60.0


@dataclass(frozen=True)
class RatioCurve:
    """r(sigma, block) = sigmoid(time(sigma) + layer[block]), before the shift to a budget.

    `time` holds logits at equally spaced sigmas from 0 to 1 (at least one; linear between them),
    `layer` one logit for each prunable block, block 1 first.
    """

    time: tuple[float, ...]
    layer: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.time or not self.layer:
            raise ShivaError("a ratio curve needs at least one sigma and one prunable block")
        if not all(math.isfinite(value) for value in (*self.time, *self.layer)):
            raise ShivaError("a ratio curve's logits must be finite")

    @classmethod
    def uniform(cls, blocks: int) -> RatioCurve:
        """The same ratio at every step in each of `blocks` blocks, of which block 0 is dense."""
        return cls((0.0,), (0.0,) * (blocks - 1))

    @property
    def blocks(self) -> int:
        """All blocks, the dense one included."""
        return len(self.layer) + 1

    def time_logit(self, sigma: float) -> float:
        position = min(max(sigma, 0.0), 1.0) * (len(self.time) - 1)
        low = min(int(position), max(len(self.time) - 2, 0))
        high = min(low + 1, len(self.time) - 1)
        return self.time[low] + (position - low) * (self.time[high] - self.time[low])

    def ratios(self, sigmas: Sequence[float], shift: float = 0.0) -> list[list[float]]:
        """Keep ratios [step][prunable block]."""
        return [
            [_sigmoid(self.time_logit(sigma) + layer + shift) for layer in self.layer]
            for sigma in sigmas
        ]


@dataclass(frozen=True)
class KTable:
    """k[step][block] of one budget, sigma grid and number of image tokens; k[step][0] = tokens."""

    budget: float
    tokens: int
    sigmas: tuple[float, ...]
    k: tuple[tuple[int, ...], ...]

    def row(self, sigma: float) -> tuple[int, ...]:
        """The row of the grid's nearest sigma, the noisier of two equally near."""
        return self.k[min(range(len(self.sigmas)), key=lambda i: abs(self.sigmas[i] - sigma))]

    @property
    def mean_keep_ratio(self) -> float:
        """Over the prunable blocks and the whole grid: the budget as it came out."""
        return sum(sum(row[1:]) for row in self.k) / (
            len(self.k) * (len(self.k[0]) - 1) * self.tokens
        )


def default_multiple(tokens: int) -> int:
    """k goes in steps of tokens / 64: at most 64 shapes, and 64 tokens at 1024 x 1024 pixels."""
    return max(1, tokens // 64)


@functools.lru_cache(maxsize=512)
def build_table(
    curve: RatioCurve,
    budget: float,
    sigmas: tuple[float, ...],
    tokens: int,
    multiple: int | None = None,
) -> KTable:
    """The table of `budget` in (0, 1] for a request's full sigma grid and its image tokens.

    Every k is a multiple of `multiple` (or all tokens) and at least one multiple. The mean is the
    budget's to within half a multiple over the whole table. Raises ShivaError for what cannot be.
    """
    if not 0.0 < budget <= 1.0:
        raise ShivaError(f"a budget is a mean keep ratio in (0, 1], not {budget}")
    if not sigmas or tokens < 1:
        raise ShivaError("a table needs at least one step and one token")
    step = multiple or default_multiple(tokens)
    if step > tokens:
        raise ShivaError(f"k cannot go in steps of {step} with {tokens} image tokens")
    shift = _shift_to(curve, budget, sigmas)
    cells = [
        min(r * tokens / step, tokens / step) for row in curve.ratios(sigmas, shift) for r in row
    ]
    whole = _round_to_sum(cells, budget * tokens / step * len(cells), tokens // step)
    width = len(curve.layer)
    k = [tokens if n == tokens // step else n * step for n in whole]
    rows = tuple((tokens, *k[i * width : (i + 1) * width]) for i in range(len(sigmas)))
    return KTable(budget, tokens, tuple(sigmas), rows)


def _shift_to(curve: RatioCurve, budget: float, sigmas: Sequence[float]) -> float:
    """The shift at which the curve's mean ratio is the budget: the mean rises with it."""
    logits = [curve.time_logit(s) + layer for s in sigmas for layer in curve.layer]
    spread = max(abs(logit) for logit in logits)
    low, high = -_MAX_SHIFT - spread, _MAX_SHIFT + spread
    for _ in range(80):
        middle = (low + high) / 2
        mean = math.fsum(_sigmoid(logit + middle) for logit in logits) / len(logits)
        low, high = (middle, high) if mean < budget else (low, middle)
    return (low + high) / 2


def _round_to_sum(cells: Sequence[float], total: float, most: int) -> list[int]:
    """Whole numbers in [1, most] near `cells` that add up to `total`, rounded, where they can.

    Largest remainders, as seats are given to parties: ties go to the earlier cell.
    """
    whole = [min(max(math.floor(cell), 1), most) for cell in cells]
    goal = min(max(round(total), len(cells)), most * len(cells))
    while (missing := goal - sum(whole)) != 0:
        up = missing > 0
        free = [i for i, n in enumerate(whole) if (n < most if up else n > 1)]
        free.sort(key=lambda i: (whole[i] - cells[i]) if up else (cells[i] - whole[i]))
        for i in free[: abs(missing)]:
            whole[i] += 1 if up else -1
    return whole


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    e = math.exp(x)
    return e / (1.0 + e)


def nearest(budgets: Sequence[float], budget: float) -> float | None:
    """The shipped budget that `budget` means, allowing for the rounding of floats."""
    ordered = sorted(budgets)
    i = bisect_left(ordered, budget - 1e-6)
    return ordered[i] if i < len(ordered) and abs(ordered[i] - budget) <= 1e-6 else None
