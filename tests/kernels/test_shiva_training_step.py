# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_backbones import TOKENS, artifact_of, call, inputs, make

from shiva_kernels import RatioPolicy, ShivaConfig, ShivaHandle, TrainingPlan, apply_shiva
from shiva_kernels.estimators import Estimator, Surrogate

K = [40, 30, 20, 10]


def prepared(name: str = "sd3") -> tuple[Any, ShivaHandle]:
    transformer = make(name)
    return transformer, apply_shiva(transformer, ShivaConfig(artifact_of(transformer), None))


def plan(**options: Any) -> TrainingPlan:
    return TrainingPlan(k=K, **options)


@pytest.mark.parametrize("estimator", list(Estimator))
def test_every_surrogate_leaves_the_forward_alone(estimator: Estimator) -> None:
    transformer, handle = prepared()
    arguments = inputs("sd3", 2)
    with handle.observe(deltas=range(5)) as teacher:
        call(transformer, arguments)
    with handle.training(plan()):
        hard = call(transformer, arguments)
    options: dict[str, Any] = {"surrogate": Surrogate(estimator)}
    with handle.training(plan(**options, teacher_delta=teacher.deltas)) as record:
        soft = transformer(**arguments)[0]
    assert torch.allclose(soft, hard, atol=1e-6)
    assert sorted(record.blocks) == [1, 2, 3, 4]
    for i, entry in record.blocks.items():
        assert entry.k == K[i - 1]
        assert entry.kept.sum(dim=1).tolist() == [entry.k] * 2
        assert entry.pi is not None
        assert entry.pi.shape == (2, TOKENS)


@pytest.mark.parametrize("estimator", list(Estimator))
def test_gradients_reach_the_router_and_the_policy(estimator: Estimator) -> None:
    transformer, handle = prepared()
    policy = RatioPolicy(handle.block_count)
    arguments = inputs("sd3", 1)
    with handle.observe(deltas=range(5)) as teacher:
        call(transformer, arguments)
    ratios = policy(torch.tensor([0.5]))[0]
    options: dict[str, Any] = {"surrogate": Surrogate(estimator), "ratios": ratios}
    with handle.training(plan(**options, teacher_delta=teacher.deltas)):
        transformer(**arguments)[0].square().mean().backward()
    grads = [p.grad for p in handle.router.groups.parameters()]
    assert any(g is not None and g.abs().sum() > 0 for g in grads)
    if estimator is Estimator.STRAIGHT_THROUGH:  # dI/dk is 0: it cannot learn a ratio
        assert policy.anchor.grad is None or policy.anchor.grad == 0
    else:
        assert policy.anchor.grad is not None
        assert policy.anchor.grad.abs() > 0
    assert all(p.grad is None for p in transformer.parameters())


def test_without_a_surrogate_no_gradient_reaches_the_router() -> None:
    transformer, handle = prepared()
    with handle.training(plan()) as record:
        out = transformer(**inputs("sd3", 1))[0]
    assert not out.requires_grad
    assert all(entry.pi is None for entry in record.blocks.values())


def test_noise_moves_the_choice_and_the_same_scores_decide_both() -> None:
    transformer, handle = prepared()
    arguments = inputs("sd3", 1)

    def run(noise: float, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"surrogate": Surrogate(), "noise": noise}
        with handle.training(plan(**options, generator=generator)) as record:
            call(transformer, arguments)
        return record.blocks

    quiet, loud, again = run(0.0, 1), run(1.0, 1), run(1.0, 1)
    assert torch.equal(quiet[1].scores, quiet[1].noisy)
    assert torch.equal(loud[1].noisy, again[1].noisy)
    assert torch.equal(loud[1].scores, quiet[1].scores)
    assert not torch.equal(loud[1].kept, quiet[1].kept)
    for entry in loud.values():
        worst_kept = entry.noisy[entry.kept].min()
        assert entry.noisy[~entry.kept].max() <= worst_kept
        assert entry.pi[entry.kept].min() >= entry.pi[~entry.kept].max()


def test_a_teachers_forward_is_dense_and_recorded() -> None:
    transformer, handle = prepared()
    arguments = inputs("sd3", 2)
    dense = call(make("sd3"), arguments)
    with handle.observe(outputs=[1, 4], deltas=[2]) as record:
        assert torch.equal(call(transformer, arguments), dense)
    assert sorted(record.outputs) == [1, 4]
    assert sorted(record.deltas) == [2]
    assert record.outputs[1].shape == record.deltas[2].shape == (2, TOKENS, 32)


def test_block_outputs_for_distillation_hold_all_tokens_and_gradients() -> None:
    transformer, handle = prepared()
    options: dict[str, Any] = {"surrogate": Surrogate(), "outputs": frozenset({2, 4})}
    with handle.training(plan(**options)) as record:
        transformer(**inputs("sd3", 2))
    assert sorted(record.outputs) == [2, 4]
    assert all(out.shape == (2, TOKENS, 32) for out in record.outputs.values())
    record.outputs[2].sum().backward()
    assert handle.router.groups[0].proj_x.weight.grad is not None


def test_the_router_does_not_train_the_backbone() -> None:
    """Scores see the tokens cut off from the graph."""
    transformer, handle = prepared()
    transformer.requires_grad_(True)
    options: dict[str, Any] = {"surrogate": Surrogate(Estimator.MOD)}
    with handle.training(plan(**options)) as record:
        transformer(**inputs("sd3", 1))
    record.blocks[1].scores.sum().backward()
    assert all(p.grad is None for p in transformer.parameters())
    assert handle.router.groups[0].proj_x.weight.grad is not None
