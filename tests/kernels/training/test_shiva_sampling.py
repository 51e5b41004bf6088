# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Strata of times and ratios."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from shiva_kernels.training.sampling import micro_seed, shifted, step_strata, stratified

seeds = st.integers(0, 2**31)


@given(seed=seeds, step=st.integers(0, 10**6), count=st.integers(1, 64))
def test_every_stratum_is_met_once(seed: int, step: int, count: int) -> None:
    strata = step_strata(seed, step, count, 1.0, (0.25, 0.75))
    assert sorted(np.floor(strata.sigmas * count).astype(int)) == list(range(count))
    ratios = (strata.ratios - 0.25) / 0.5
    assert sorted(np.floor(ratios * count).astype(int)) == list(range(count))


@given(seed=seeds, count=st.integers(1, 16), world=st.integers(1, 4))
def test_processes_share_the_strata_out(seed: int, count: int, world: int) -> None:
    whole = step_strata(seed, 3, count * world, 1.5, (0.3, 1.0))
    parts = [whole.of_rank(rank, world) for rank in range(world)]
    assert all(len(part.sigmas) == count for part in parts)
    assert sorted(np.concatenate([part.sigmas for part in parts])) == sorted(whole.sigmas)


def test_times_and_ratios_are_permuted_apart() -> None:
    strata = [step_strata(0, step, 8, 1.0, (0.2, 1.0)) for step in range(200)]
    sigmas = np.concatenate([s.sigmas for s in strata])
    ratios = np.concatenate([s.ratios for s in strata])
    assert abs(np.corrcoef(sigmas, ratios)[0, 1]) < 0.1


def test_stratified_means_vary_less_than_plain_ones() -> None:
    means = [stratified(8, np.random.default_rng(seed)).mean() for seed in range(500)]
    plain = [np.random.default_rng(seed).random(8).mean() for seed in range(500)]
    assert np.var(means) < 0.05 * np.var(plain)  # 1 / count^2, in theory


@pytest.mark.parametrize("shift", [1.0, 1.5, 3.0])
def test_the_shift_is_the_schedulers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    times = np.arange(1000, 0, -1) / 1000
    assert torch.allclose(
        scheduler.sigmas[:1000].double(), torch.tensor(shifted(times, shift)), atol=1e-6
    )


def test_seeds_differ_in_every_argument() -> None:
    base = micro_seed(1, 2, 3, 4)
    others = [micro_seed(*a) for a in [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)]]
    assert base == micro_seed(1, 2, 3, 4)
    assert len({base, *others}) == 5
    assert all(0 <= seed < 2**63 for seed in (base, *others))
