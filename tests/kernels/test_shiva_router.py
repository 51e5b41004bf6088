# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from shiva_kernels.config import Guidance, PairScore
from shiva_kernels.errors import Unsupported
from shiva_kernels.policy import BudgetLoss, RatioPolicy
from shiva_kernels.router import ShivaRouter, parameter_count
from shiva_kernels.selection import kept_mask, scores_of_images, standardise, top_k


@pytest.mark.parametrize(
    ("name", "sharing", "width", "millions"),
    [
        ("Tiny", 24, 64, 0.3),
        ("Shared", 24, 512, 2.6),
        ("Max", 1, 512, 64.0),
        ("Slim", 1, 64, 8.0),
        ("Group-4", 6, 128, 2.7),
        ("Group-8", 3, 64, 2.7),
        ("Group-12", 2, 64, 4.1),
    ],
)
def test_sizes_of_the_papers_sharing_schemes(
    name: str, sharing: int, width: int, millions: float
) -> None:
    """Table 2 on SD3: tokens and times of 1536, pooled CLIP of 2048, 24 blocks."""
    count = parameter_count(1536, 1536, 2048, 24, width, sharing) / 1e6
    assert count == pytest.approx(millions, rel=0.12 if name == "Tiny" else 0.03)


def test_two_neighbours_share_weights_and_differ_in_their_embedding() -> None:
    torch.manual_seed(0)
    router = ShivaRouter(8, 8, 6, blocks=6, width=4, sharing=2)
    assert len(router.groups) == 3
    x, t, c = torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(2, 6)
    assert not torch.allclose(router(x, t, c, 2), router(x, t, c, 3))
    with torch.no_grad():
        router.layer_embedding.weight[3] = router.layer_embedding.weight[2]
    assert torch.equal(router(x, t, c, 2), router(x, t, c, 3))


def test_scores_depend_on_time_text_and_token() -> None:
    torch.manual_seed(0)
    router = ShivaRouter(8, 8, 6, blocks=4)
    x, t, c = torch.randn(1, 5, 8), torch.randn(1, 8), torch.randn(1, 6)
    base = router(x, t, c, 1)
    assert base.shape == (1, 5)
    assert not torch.allclose(base, router(x + 1, t, c, 1))
    assert not torch.allclose(base, router(x, t + 1, c, 1))
    assert not torch.allclose(base, router(x, t, c + 1, 1))


def test_scores_are_float32_under_autocast() -> None:
    router = ShivaRouter(8, 8, 6, blocks=4)
    x, t, c = torch.randn(1, 5, 8), torch.randn(1, 8), torch.randn(1, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x.bfloat16(), t.bfloat16(), c.bfloat16(), 1)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, router(x.bfloat16(), t.bfloat16(), c.bfloat16(), 1))


def test_the_policy_starts_at_its_target_and_is_additive() -> None:
    torch.manual_seed(0)
    policy = RatioPolicy(blocks=5, target=0.6)
    sigma = torch.tensor([0.1, 0.9])
    assert torch.allclose(policy(sigma), torch.full((2, 4), 0.6))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    logits = policy.logits(sigma)
    # What time changes is the same in every block (Eq. 10).
    assert torch.allclose((logits[1] - logits[0]).std(), torch.tensor(0.0), atol=1e-5)
    assert logits[0].std() > 1e-3


def test_the_policy_becomes_a_look_up() -> None:
    torch.manual_seed(0)
    policy = RatioPolicy(blocks=5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    sigmas = [i / 64 for i in (0, 7, 32, 64)]
    found = torch.tensor(policy.curve(65).ratios(sigmas))
    assert torch.allclose(found, policy(torch.tensor(sigmas)).double().float(), atol=1e-6)


def test_the_budget_loss_pulls_by_the_running_mean_alone() -> None:
    """Eq. 12-13 by hand."""
    loss = BudgetLoss(target=0.6, weight=3.0, beta=0.2)
    ratios = torch.tensor([0.8, 1.0], requires_grad=True)
    value = loss(ratios)
    mu = 0.2 * 0.9 + 0.8 * 0.6
    assert loss.mu.item() == pytest.approx(mu)
    assert value.item() == pytest.approx(3 * 0.9 * 2 * (mu - 0.6))
    value.backward()
    assert torch.allclose(ratios.grad, torch.full((2,), 3 * 2 * (mu - 0.6) / 2))
    assert "mu" in loss.state_dict()


def test_the_budget_loss_brings_the_mean_to_the_target() -> None:
    logits = torch.nn.Parameter(torch.tensor([2.5, 2.0, 0.5]))
    loss, optimiser = BudgetLoss(0.6), torch.optim.SGD([logits], lr=2.0)
    for _ in range(300):
        optimiser.zero_grad()
        loss(torch.sigmoid(logits)).backward()
        optimiser.step()
    ratios = torch.sigmoid(logits)
    assert ratios.mean().item() == pytest.approx(0.6, abs=0.005)
    # Only the mean is held: the entries keep their order and their distance.
    assert (ratios[0] - ratios[2]).item() > 0.2


def test_top_k_is_ascending_and_prefers_the_earlier_of_equals() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]])
    assert top_k(scores, 2).tolist() == [[1, 2]]
    assert top_k(scores, 4).tolist() == [[0, 1, 2, 4]]
    assert kept_mask(top_k(scores, 2), 5).tolist() == [[False, True, True, False, False]]


def test_bfloat16_scores_that_tie_are_told_apart_in_float32() -> None:
    x = 1 + torch.arange(64) * 1e-4
    assert len(x.bfloat16().unique()) < 10
    assert top_k(standardise(x[None]), 8).tolist() == [list(range(56, 64))]


def test_standardised_scores_have_mean_0_and_deviation_1_in_each_row() -> None:
    scores = standardise(torch.randn(3, 100) * torch.tensor([[1.0], [50.0], [0.1]]) + 7)
    assert torch.allclose(scores.mean(1), torch.zeros(3), atol=1e-5)
    assert torch.allclose(scores.std(1, unbiased=False), torch.ones(3), atol=2e-3)
    assert torch.equal(standardise(torch.full((1, 4), 2.0)), torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (PairScore.MAXIMUM, [[5.0, 2.0], [3.0, 8.0]]),
        (PairScore.CONDITIONAL, [[0.0, 2.0], [3.0, 4.0]]),
        (PairScore.MEAN, [[2.5, 1.5], [2.0, 6.0]]),
    ],
)
def test_a_pairs_scores(how: PairScore, expected: list[list[float]]) -> None:
    """Rows: unconditional of both images, then conditional of both."""
    rows = torch.tensor([[5.0, 1.0], [1.0, 8.0], [0.0, 2.0], [3.0, 4.0]])
    assert scores_of_images(rows, Guidance.PAIR, how).tolist() == expected
    assert scores_of_images(rows, Guidance.NONE, how) is rows


def test_an_odd_batch_is_no_batch_of_pairs() -> None:
    with pytest.raises(Unsupported, match="even batch"):
        scores_of_images(torch.zeros(3, 4), Guidance.PAIR, PairScore.MAXIMUM)


def test_anchor_is_the_inverse_sigmoid_of_the_target() -> None:
    assert RatioPolicy(3, 0.6).anchor.item() == pytest.approx(math.log(1.5))
