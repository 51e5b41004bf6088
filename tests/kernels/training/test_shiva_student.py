# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Student and teacher: one set of weights, two forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_student import CHANNELS, SIDE, RandomSource, student_of, tiny_transformer

from shiva_kernels.config import Guidance
from shiva_kernels.training.config import Arm, Ratios, Scores, TrainConfig
from shiva_kernels.training.student import Pruning, Student

SIGMA = torch.tensor(0.5)


def config_of(**changes: Any) -> TrainConfig:
    return TrainConfig(rank=2, router_width=8, **changes)


def mixed(count: int = 2) -> torch.Tensor:
    return torch.randn(count, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def kept_of(student: Student, pruning: Pruning, count: int = 2) -> dict[int, torch.Tensor]:
    """What a forward kept, seen from inside: the block's tokens that changed."""
    found: dict[int, torch.Tensor] = {}
    plan = student._plan(mixed(count), pruning, 0)
    batch = RandomSource().batch(0, count)
    with student.handle.training(plan) as record:
        student._velocity(mixed(count), SIGMA, batch)
    for block, entry in record.blocks.items():
        found[block] = entry.kept
    return found


def test_the_teacher_is_the_plain_transformer_bit_for_bit() -> None:
    student = student_of(config_of())
    with torch.no_grad():
        for parameter in student.adapter().values():
            parameter.add_(0.1)
    student.adapting = True
    batch, plain = RandomSource().batch(0, 2), tiny_transformer()
    expected = plain(mixed(), batch.context, batch.pooled, torch.full((2,), 500.0)).sample
    assert torch.equal(student.teacher(mixed(), SIGMA, batch).velocity, expected)
    assert not torch.equal(student.observe(mixed(), SIGMA, batch, None).velocity, expected)


def test_all_tokens_kept_is_dense_bit_for_bit() -> None:
    student, batch = student_of(config_of()), RandomSource().batch(0, 2)
    everything = Pruning(torch.ones(student.prunable))
    dense = student.observe(mixed(), SIGMA, batch, None, every=2)
    same = student.observe(mixed(), SIGMA, batch, everything, every=2)
    assert torch.equal(dense.velocity, same.velocity)
    assert len(same.features) == 2
    assert all(torch.equal(a, b) for a, b in zip(dense.features, same.features, strict=True))


def test_ratios_become_tokens() -> None:
    student = student_of(config_of())
    kept = kept_of(student, Pruning(torch.tensor([0.5, 0.25, 0.999])))
    assert {block: int(mask.sum(1)[0]) for block, mask in kept.items()} == {1: 8, 2: 4, 3: 15}


def test_teacher_norm_keeps_what_the_teacher_changes_most() -> None:
    arm = Arm(scores=Scores.TEACHER_NORM, ratios=Ratios.FIXED, estimator=None)
    student, batch = student_of(config_of(arm=arm)), RandomSource().batch(0, 2)
    deltas = student.teacher(mixed(), SIGMA, batch, deltas=True).deltas
    assert deltas is not None
    kept = kept_of(student, Pruning(torch.full((3,), 0.25), deltas=deltas))
    for block, mask in kept.items():
        norms = deltas[block].norm(dim=-1)
        assert norms[mask].view(2, 4).min() >= norms[~mask].view(2, 12).min()
        assert torch.equal(mask, norms >= norms.topk(4).values[:, -1:])


def test_random_scores_follow_the_generator() -> None:
    arm = Arm(scores=Scores.RANDOM, ratios=Ratios.FIXED, estimator=None)
    student = student_of(config_of(arm=arm))

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return kept_of(student, Pruning(torch.full((3,), 0.5), generator=generator))[1]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_both_branches_of_a_pair_keep_the_same_tokens() -> None:
    student = student_of(config_of())
    pair = Pruning(torch.full((3,), 0.5), guidance=Guidance.PAIR)
    alone = Pruning(torch.full((3,), 0.5))
    for mask in kept_of(student, pair, count=4).values():
        assert torch.equal(mask[:2], mask[2:])
    assert any(not torch.equal(m[:2], m[2:]) for m in kept_of(student, alone, count=4).values())


def test_state_goes_into_another_student() -> None:
    config = config_of()
    student, other = student_of(config), student_of(config)
    with torch.no_grad():
        for parameter in (*student.router.parameters(), *student.adapter().values()):
            parameter.add_(0.1)
    student.adapting = True
    other.load_state(student.state())
    batch, half = RandomSource().batch(0, 2), Pruning(torch.full((3,), 0.5))
    ours, theirs = (s.observe(mixed(), SIGMA, batch, half).velocity for s in (student, other))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("on", [True, False])
def test_switching_the_adapter_does_not_thaw_it(on: bool) -> None:
    student = student_of(config_of())
    for parameter in student.adapter().values():
        parameter.requires_grad_(False)
    student.adapting = on
    student.observe(mixed(), SIGMA, RandomSource().batch(0, 2), None)
    assert not any(parameter.requires_grad for parameter in student.adapter().values())
