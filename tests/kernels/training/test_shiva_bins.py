# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Ratios between tenths: two forwards in training, the nearest tenth after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_student import CHANNELS, SIDE, RandomSource, student_of

from shiva_kernels.errors import ShivaError
from shiva_kernels.estimators import Estimator, Surrogate
from shiva_kernels.training.assemble import curve_of
from shiva_kernels.training.bins import REGIONS, BinnedRatios, bracketing
from shiva_kernels.training.config import Arm, Ratios, Steps, TrainConfig
from shiva_kernels.training.student import Pruning, Student
from shiva_kernels.training.trainer import Trainer

CONFIG = TrainConfig(
    arm=Arm(ratios=Ratios.BINS, estimator=Estimator.MOD),
    steps=Steps(router=1, policy=2, joint=1),
    micro_batches=4,
    warmup=0,
    rank=2,
    router_width=8,
)


def velocity(student: Student, ratio: float, *, learns: bool = True) -> torch.Tensor:
    batch = RandomSource().batch(0, 2)
    mixed = torch.randn(2, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    ratios = torch.full((student.prunable,), ratio, requires_grad=learns)
    surrogate = Surrogate(Estimator.MOD) if learns else None
    return student.observe(mixed, torch.tensor(0.5), batch, Pruning(ratios, surrogate)).velocity


def test_a_ratio_lies_between_two_tenths_and_moves_the_share() -> None:
    ratio = torch.tensor(0.63, requires_grad=True)
    low, high, share = bracketing(ratio)
    assert (low, high) == (0.6, 0.7)
    assert share.item() == pytest.approx(0.3, abs=1e-5)
    share.backward()
    assert ratio.grad is not None
    assert ratio.grad.item() == pytest.approx(10)
    assert bracketing(torch.tensor(1.0))[:2] == (0.9, 1.0)


def test_at_a_tenth_the_mixture_is_that_tenth() -> None:
    student = student_of(CONFIG)
    at, below = velocity(student, 0.5), velocity(student, 0.5, learns=False)
    assert torch.allclose(at, below, atol=1e-5)
    between = velocity(student, 0.55)
    assert not torch.allclose(between, at, atol=1e-5)


def test_the_ratios_learn_and_the_mean_is_held(tmp_path: Path) -> None:
    student = student_of(CONFIG)
    policy = student.policy
    assert isinstance(policy, BinnedRatios)
    before = policy.logit.detach().clone()
    Trainer(CONFIG, student, RandomSource(), tmp_path).run()
    assert (policy.logit != before).any()
    loss = policy.loss(torch.tensor([0.7, 0.7]), 0.3)
    assert loss.item() == pytest.approx(0.003, rel=1e-4)


def test_a_table_has_nearest_tenths_of_about_the_budget() -> None:
    policy = BinnedRatios(5, 0.6)
    with torch.no_grad():
        policy.logit.copy_(torch.linspace(-2, 2, 4 * REGIONS).view(REGIONS, 4))
    sigmas = tuple(1 - i / 20 for i in range(20))
    table = policy.table(0.6, sigmas, 640)
    assert {k % 64 for row in table.k for k in row} == {0}
    assert all(row[0] == 640 for row in table.k)
    assert table.mean_keep_ratio == pytest.approx(0.6, abs=0.02)
    assert len(set(table.k)) == REGIONS


def test_it_makes_no_artifact() -> None:
    with pytest.raises(ShivaError, match="to compare with"):
        curve_of(student_of(CONFIG))
