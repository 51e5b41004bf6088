# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The estimators: forward untouched, and each arm's gradient as its formula says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shiva_kernels.estimators import (
    Estimator,
    Surrogate,
    gate_input,
    gate_output,
    soft_selection,
)
from shiva_kernels.ops import gather_tokens, scatter_tokens, soft_rank

RANKED = (Estimator.RESIDUAL, Estimator.PROSE, Estimator.MOD, Estimator.BENEFIT)
BATCH, TOKENS, WIDTH, KEPT = 2, 11, 5, 6


def _randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class _Case:
    """One pruned block of float64 tokens; its block mixes tokens, as attention does."""

    def __init__(self) -> None:
        self.x = _randn(BATCH, TOKENS, WIDTH, seed=0).requires_grad_()
        self.scores = _randn(BATCH, TOKENS, seed=1).requires_grad_()
        self.k = torch.full((BATCH,), KEPT + 0.4, dtype=torch.float64, requires_grad=True)
        self.delta = _randn(BATCH, TOKENS, WIDTH, seed=2)
        self.weights = _randn(BATCH, TOKENS, WIDTH, seed=3)
        self.index = self.scores.topk(KEPT, dim=1).indices
        self.kept = torch.zeros(BATCH, TOKENS, dtype=torch.bool).scatter(1, self.index, True)

    def block(self, tokens: Tensor) -> Tensor:
        return tokens + torch.tanh(tokens.flip(2) + tokens.mean(1, keepdim=True))

    def loss(self, out: Tensor) -> Tensor:
        return (out.sin() * self.weights).sum()

    def pruned(self, x: Tensor) -> Tensor:
        return scatter_tokens(x, self.index, self.block(gather_tokens(x, self.index)))

    def gated(self, arm: Estimator, x: Tensor, pi: Tensor) -> Tensor:
        before = gate_input(x, pi, self.kept, arm)
        out = self.pruned(before)
        return gate_output(before, out, pi, self.kept, arm, teacher_delta=self.delta)


# Each arm again, as the product of features with a gate whose value is one.
def _input_gate(case: _Case, pi: Tensor, *, rejected: float, kept: float = 1) -> Tensor:
    d, m = pi - pi.detach(), case.kept
    gate = torch.where(m, 1 + kept * d, 1 + rejected * d)
    return case.pruned(gate[..., None] * case.x)


def _mod(case: _Case, pi: Tensor) -> Tensor:
    residual = case.pruned(case.x) - case.x
    return case.x + (1 + pi - pi.detach())[..., None] * residual


def _benefit(case: _Case, pi: Tensor) -> Tensor:
    d = (pi - pi.detach())[..., None]
    return _mod(case, pi) + torch.where(case.kept[..., None], 0, d * case.delta)


FORMULAS: dict[Estimator, Callable[[_Case, Tensor], Tensor]] = {
    Estimator.RESIDUAL: lambda case, pi: _input_gate(case, pi, rejected=-1),
    Estimator.PROSE: lambda case, pi: _input_gate(case, pi, rejected=-1, kept=-1),
    Estimator.THRESHOLD: lambda case, pi: _input_gate(case, pi, rejected=-1),
    Estimator.STRAIGHT_THROUGH: lambda case, pi: _input_gate(case, pi, rejected=0),
    Estimator.MOD: _mod,
    Estimator.BENEFIT: _benefit,
}


@pytest.mark.parametrize("arm", list(Estimator))
def test_forward_is_the_ungated_bits(arm):
    case = _Case()
    pi = soft_selection(case.scores, case.k, Surrogate(arm))
    assert torch.equal(case.gated(arm, case.x, pi), case.pruned(case.x))


@pytest.mark.parametrize("arm", list(Estimator))
def test_gradients_are_those_of_the_arms_formula(arm):
    case = _Case()
    pi = soft_selection(case.scores, case.k, Surrogate(arm))
    out, formula = case.gated(arm, case.x, pi), FORMULAS[arm](case, pi)
    inputs = (case.x, case.scores, case.k)
    ours, theirs = (
        torch.autograd.grad(case.loss(o), inputs, retain_graph=True) for o in (out, formula)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("arm", list(Estimator))
def test_gradient_of_the_features_is_that_of_the_ungated_block(arm):
    case = _Case()
    pi = soft_selection(case.scores, case.k, Surrogate(arm))
    gated, plain = case.gated(arm, case.x, pi), case.pruned(case.x)
    ours, theirs = (torch.autograd.grad(case.loss(o), case.x)[0] for o in (gated, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_residual_is_equation_7():
    case = _Case()
    pi = torch.full((BATCH, TOKENS), 0.3, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(case.loss(case.gated(Estimator.RESIDUAL, case.x, pi)), pi)
    (grad,) = torch.autograd.grad(case.loss(case.pruned(case.x)), case.x)
    expected = torch.where(case.kept, 1, -1) * (grad * case.x).sum(2)
    torch.testing.assert_close(g, expected.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("arm", list(Estimator))
def test_one_compiled_graph_gives_the_same_gradients(arm):
    case = _Case()

    def step(x: Tensor, scores: Tensor, k: Tensor) -> Tensor:
        return case.loss(case.gated(arm, x, soft_selection(scores, k, Surrogate(arm))))

    inputs = (case.x, case.scores, case.k)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(call(*inputs), inputs) for call in (step, compiled)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("arm", RANKED)
def test_soft_selection_is_equation_30(arm):
    case = _Case()
    surrogate = Surrogate(arm, tau_rank=0.3, tau_sel=0.07)
    ranks = soft_rank(case.scores, 0.3)
    expected = torch.sigmoid((case.k[:, None] - ranks) / (0.07 * TOKENS))
    torch.testing.assert_close(soft_selection(case.scores, case.k, surrogate), expected)


def test_soft_selection_takes_one_k_for_the_whole_batch():
    case = _Case()
    one = soft_selection(case.scores, torch.tensor(6.4), Surrogate())
    each = soft_selection(case.scores, torch.full((BATCH,), 6.4), Surrogate())
    assert torch.equal(one, each)


@pytest.mark.parametrize("arm", [*RANKED, Estimator.THRESHOLD])
def test_more_k_selects_every_token_more(arm):
    case = _Case()
    less, more = (soft_selection(case.scores, torch.tensor(k), Surrogate(arm)) for k in (4.0, 5.0))
    assert bool((more > less).all())


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(2, 60),
    share=st.floats(0.05, 0.95),
    tau=st.floats(0.05, 1),
    seed=st.integers(0, 9999),
)
def test_threshold_selection_sums_to_k(tokens, share, tau, seed):
    scores = _randn(2, tokens, seed=seed)
    pi = soft_selection(
        scores, torch.tensor(share * tokens), Surrogate(Estimator.THRESHOLD, tau_rank=tau)
    )
    torch.testing.assert_close(
        pi.sum(1), torch.full((2,), share * tokens, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


def test_threshold_selection_has_the_derivatives_of_the_implicit_function():
    case = _Case()
    pi = soft_selection(case.scores, case.k, Surrogate(Estimator.THRESHOLD))
    grad = _randn(BATCH, TOKENS, seed=5)
    in_scores, in_k = torch.autograd.grad(pi, (case.scores, case.k), grad)
    v = (pi * (1 - pi)).detach()
    mean = (v * grad).sum(1, keepdim=True) / v.sum(1, keepdim=True)
    torch.testing.assert_close(in_scores, v * (grad - mean) / 0.2, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(in_k, mean[:, 0], rtol=1e-6, atol=1e-8)


def test_plain_straight_through_cannot_move_k():
    case = _Case()
    pi = soft_selection(case.scores, case.k, Surrogate(Estimator.STRAIGHT_THROUGH))
    assert torch.equal(pi.detach() == 1, case.kept)
    in_scores, in_k = torch.autograd.grad(pi.sum(), (case.scores, case.k))
    assert torch.equal(in_scores, torch.ones_like(in_scores))
    assert torch.equal(in_k, torch.zeros_like(in_k))


def test_half_precision_features_give_float32_gradients_of_pi():
    case = _Case()
    x = case.x.detach().to(torch.bfloat16).requires_grad_()
    pi = torch.full((BATCH, TOKENS), 0.5, requires_grad=True)
    out = gate_input(x, pi, case.kept, Estimator.RESIDUAL)
    assert out.dtype == torch.bfloat16
    in_x, in_pi = torch.autograd.grad(out.float().sum(), (x, pi))
    assert (in_x.dtype, in_pi.dtype) == (torch.bfloat16, torch.float32)


def test_benefit_says_what_it_is_missing():
    case = _Case()
    pi = torch.ones(BATCH, TOKENS, requires_grad=True)
    with pytest.raises(ValueError, match=r"needs teacher_delta \[B, N, D\]"):
        gate_output(case.x, case.x, pi, case.kept, Estimator.BENEFIT)
