# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which times and keep ratios an optimiser step sees: stratified, seeded, equal after a restart.

A micro-batch has one timestep, because k must be equal in it, so micro-batches are the strata. With
n of them over all processes, stratum i of the uniform draw is [i / n, (i + 1) / n) (Eq. 15 of
arXiv 2602.05605): the variance between strata is gone from the batch mean (A.4). Ratios of the
router's warm-up have strata of their own, permuted independently of the times.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class StepStrata:
    """What the micro-batches of one optimiser step use, in order.

    `sigmas` are noise levels in (0, 1), after the scheduler's shift; `ratios` keep ratios in
    [low, high], for stages in which the policy does not speak.
    """

    sigmas: Array
    ratios: Array

    def of_rank(self, rank: int, world: int) -> StepStrata:
        """The share of one process: every `world`-th stratum."""
        return StepStrata(self.sigmas[rank::world], self.ratios[rank::world])


def stratified(count: int, rng: np.random.Generator) -> Array:
    """`count` draws from U[0, 1), one from each of `count` equal strata, in random order."""
    return rng.permutation((np.arange(count) + rng.random(count)) / count)


def shifted(times: Array, shift: float) -> Array:
    """The scheduler's noise level at a share of its grid: s t / (1 + (s - 1) t).

    This is `FlowMatchEulerDiscreteScheduler`'s static shift, so that a uniform `times` gives the
    levels which sampling visits, as often as sampling visits them.
    """
    return shift * times / (1 + (shift - 1) * times)


def step_strata(
    seed: int, step: int, count: int, shift: float, ratio_range: tuple[float, float]
) -> StepStrata:
    """The strata of an optimiser step, a pure function of (seed, step).

    `count` is the number of micro-batches over all processes. No noise level is 0 or 1: both ends
    have a velocity that says nothing about the other.
    """
    rng = np.random.default_rng([seed, step, 0xD17])
    times = np.clip(stratified(count, rng), 1e-3, 1 - 1e-3)
    low, high = ratio_range
    return StepStrata(shifted(times, shift), low + (high - low) * stratified(count, rng))


def micro_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """A seed for everything random in one micro-batch: data, noise, dropout of captions."""
    mixed = np.random.SeedSequence([seed, step, micro, rank]).generate_state(1, np.uint64)
    return int(mixed[0] >> np.uint64(1))
