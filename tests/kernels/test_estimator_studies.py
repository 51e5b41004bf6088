# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The studies of the estimators, cut short: the flip test, and the synthetic study of the paper."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.kernels import flips, synthetic
from shiva_kernels.estimators import Estimator


def test_exact_benefit_is_what_a_run_with_the_token_on_the_other_side_gives():
    network, start = next(iter(flips.random_cases(1, tokens=9)))
    target = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    selections = {1: torch.tensor([[0, 2, 3, 7]]), 2: torch.tensor([[1, 2, 5, 8]])}

    def loss(kept: list[int]) -> float:
        step = flips.pruned_step(network, {**selections, 1: torch.tensor([kept])})
        return float(flips.losses(network, start, step, 0, target))

    step = flips.pruned_step(network, selections)
    entering = list(flips.walk(network, start, step))
    found = flips.benefits(network, entering[1], 1, selections, target)
    here = loss([0, 2, 3, 7])
    assert float(found.abs().min()) > 1e-4
    assert float(found[2]) == pytest.approx(loss([0, 3, 7]) - here, abs=1e-5)
    assert float(found[5]) == pytest.approx(here - loss([0, 2, 3, 5, 7]), abs=1e-5)


def test_the_benefit_arm_orders_tokens_and_the_residual_arm_does_not():
    """288 flips of random networks; benchmarks/results/kernels_flips.csv has thousands."""
    verdict = flips.flip_test(flips.random_cases(2), "all")
    assert sum(len(b) for b in verdict.benefits) == 2 * 3 * 48
    found = {(arm, figure): mean for arm, figure, mean, _ in flips.summary(verdict)}
    assert found["mod", "rank_kept"] > 0.3
    assert found["benefit", "rank_kept"] == found["mod", "rank_kept"]
    assert found["benefit", "rank_rejected"] > 0.2
    assert found["benefit", "sign_rejected"] > 0.9
    assert found["residual", "rank_kept"] < 0
    # What they say nothing of, they are not given credit for.
    assert math.isnan(found["mod", "sign_rejected"])
    assert math.isnan(found["straight-through", "sign_k"])


def test_k_finds_the_signal_tokens():
    end = synthetic.study(Estimator.RESIDUAL, seed=0)
    assert end.curve[0] == synthetic.K_START
    assert end.k == pytest.approx(18, abs=3)
    assert end.signals_kept >= 0.9


def test_the_estimate_points_along_the_ideal_gradient():
    cosines = torch.tensor([synthetic.cosines(seed)[0] for seed in range(50)])
    assert bool((cosines > 0).all())
