# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from tiny_backbones import TEXT, TOKENS, artifact_of, make

from shiva_kernels import ShivaConfig, apply_shiva
from shiva_kernels.flops import SETTINGS, cost_model, paper_table

K = 20


def test_the_papers_sd3_medium() -> None:
    """Table 1: 11.80 T dense (mixed counting), 8.92 T and 6.96 T under its two budgets."""
    dense, most, few = paper_table(SETTINGS[:1])
    assert dense[2:5] == ("11.80", "11.80", "17.81")
    assert float(most[3]) == pytest.approx(8.92, abs=0.05)
    assert float(most[6]) == pytest.approx(0.80, abs=0.005)
    assert float(few[6]) == pytest.approx(0.65, abs=0.005)


@pytest.mark.slow
def test_the_papers_flux() -> None:
    """Table 5: 44.63 T dense, 33.93 T pruned."""
    dense, most, _ = paper_table(SETTINGS[2:3])
    assert dense[2:4] == ("44.63", "44.63")
    assert float(most[6]) == pytest.approx(0.78, abs=0.01)


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_costs_are_quadratic_in_k_and_fall_with_it(name: str) -> None:
    transformer = make(name)
    size = (16, 16)
    model = cost_model(transformer, 1, size, TEXT)
    assert model.tokens == TOKENS
    costs = [model.uniform(r).true for r in (0.25, 0.5, 0.75)]
    assert costs == sorted(costs)
    assert costs[-1] < model.dense.true
    # A fourth point lies on the curve that three points gave.
    half = model.blocks[1].of(TOKENS / 2)
    ends = [model.blocks[1].of(TOKENS * r).attention for r in (0.25, 0.75)]
    assert half.attention < sum(ends) / 2
    assert model.implied_ratio(costs[1], lambda f: f.true) == pytest.approx(0.5, abs=1e-6)


def test_a_handle_tells_what_its_budgets_cost() -> None:
    transformer = make("sd3")
    handle = apply_shiva(transformer, ShivaConfig(artifact_of(transformer), 0.6))
    pruned, dense = handle.flops(0.6, rows=2, size=(16, 16), text=TEXT)
    fewer, _ = handle.flops(0.4, rows=2, size=(16, 16), text=TEXT)
    assert fewer.true < pruned.true < dense.true
    assert pruned.mixed < pruned.true
    rows = handle.table(0.6, tokens=TOKENS).k
    model = cost_model(transformer, 2, (16, 16), TEXT)
    by_rows = sum(model.of_row(row).true for row in rows) / len(rows)
    assert pruned.true == pytest.approx(by_rows)


def test_a_blocks_cost_by_hand() -> None:
    """SD3: 24 D^2 for each image and text token, 4 D for each pair of tokens, and AdaLN."""
    model = cost_model(make("sd3"), 1, (16, 16), TEXT)
    dim = 32
    modulation = 2 * 2 * dim * 6 * dim
    dense = model.blocks[1].dense
    assert dense.linear == 24 * dim**2 * (TOKENS + TEXT) + modulation
    assert dense.attention == 4 * dim * (TOKENS + TEXT) ** 2
    router = 2 * TOKENS * 64 * (dim + 1) + 2 * 64 * (dim + 24 + 64)
    pruned = model.blocks[1].of(K)
    assert pruned.linear == pytest.approx(24 * dim**2 * (K + TEXT) + modulation + router, rel=1e-6)
    assert pruned.attention == pytest.approx(4 * dim * (K + TEXT) ** 2, rel=1e-6)
