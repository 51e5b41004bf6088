# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiva_kernels.errors import ShivaError
from shiva_kernels.tables import RatioCurve, build_table, default_multiple

logits = st.floats(-8, 8)
curves = st.builds(
    RatioCurve,
    st.lists(logits, min_size=1, max_size=9).map(tuple),
    st.lists(logits, min_size=1, max_size=30).map(tuple),
)
grids = st.lists(st.floats(0.01, 1), min_size=1, max_size=30).map(
    lambda values: tuple(sorted(values, reverse=True))
)


@settings(max_examples=60, deadline=None)
@given(curves, st.floats(0.05, 1.0), grids, st.integers(16, 4096))
def test_the_mean_keep_ratio_is_the_budget(
    curve: RatioCurve, budget: float, sigmas: tuple[float, ...], tokens: int
) -> None:
    step = default_multiple(tokens)
    table = build_table(curve, budget, sigmas, tokens)
    cells = len(sigmas) * len(curve.layer)
    # Half a step over the whole table, and what "at least a step" and "at most whole steps" force.
    slack = step / 2 / (cells * tokens)
    floor, ceiling = step / tokens, tokens // step * step / tokens
    if budget >= ceiling:
        assert table.mean_keep_ratio >= ceiling - slack
    else:
        assert abs(table.mean_keep_ratio - max(budget, floor)) <= slack + (1 - ceiling) + 1e-9


@settings(max_examples=40, deadline=None)
@given(curves, st.floats(0.05, 1.0), grids, st.integers(16, 4096))
def test_every_k_is_a_multiple_or_all_and_block_0_is_dense(
    curve: RatioCurve, budget: float, sigmas: tuple[float, ...], tokens: int
) -> None:
    step = default_multiple(tokens)
    table = build_table(curve, budget, sigmas, tokens)
    assert {row[0] for row in table.k} == {tokens}
    ks = {k for row in table.k for k in row}
    assert all(k == tokens or (k % step == 0 and step <= k < tokens) for k in ks)
    assert len(ks) <= 128


@settings(max_examples=30, deadline=None)
@given(curves, st.floats(0.1, 0.9), grids)
def test_a_larger_logit_never_keeps_less(
    curve: RatioCurve, budget: float, sigmas: tuple[float, ...]
) -> None:
    table = build_table(curve, budget, sigmas, 1024)
    for row in table.k:
        pairs = sorted(zip(curve.layer, row[1:], strict=True))
        ks = [k for _, k in pairs]
        # Rounding may move neighbours by one step, and no more.
        assert all(a <= b + 16 for a, b in itertools.pairwise(ks))


def test_budget_1_keeps_all() -> None:
    table = build_table(RatioCurve((0.0, 5.0), (1.0, -3.0)), 1.0, (1.0, 0.5), 256)
    assert {k for row in table.k for k in row} == {256}


def test_a_table_is_rebuilt_for_another_step_count_with_the_same_mean() -> None:
    curve = RatioCurve((2.0, 0.0, -2.0), (0.5, 0.0, -0.5))
    for steps in (4, 20, 50):
        sigmas = tuple(1 - i / steps for i in range(steps))
        table = build_table(curve, 0.6, sigmas, 1024)
        assert len(table.k) == steps
        assert table.mean_keep_ratio == pytest.approx(0.6, abs=0.003)
        # The curve falls with noise: noisy steps keep less.
        assert sum(table.k[0]) < sum(table.k[-1])


def test_part_of_a_request_takes_its_rows_by_sigma() -> None:
    """Image-to-image at strength 0.5, or a resumed lease: the same rows, fewer of them."""
    sigmas = tuple(1 - i / 10 for i in range(10))
    table = build_table(RatioCurve((2.0, -2.0), (0.0, 0.3)), 0.6, sigmas, 1024)
    for sigma, row in list(zip(sigmas, table.k, strict=True))[5:]:
        assert table.row(sigma) == row
        assert table.row(sigma + 1e-4) == row


def test_what_cannot_be_a_table_is_refused() -> None:
    curve = RatioCurve.uniform(4)
    for budget in (0.0, -1.0, 1.01, float("nan")):
        with pytest.raises(ShivaError, match="budget"):
            build_table(curve, budget, (1.0,), 64)
    with pytest.raises(ShivaError, match="step"):
        build_table(curve, 0.5, (), 64)
    with pytest.raises(ShivaError, match="finite"):
        RatioCurve((float("inf"),), (0.0,))


def test_tables_and_the_package_import_neither_torch_nor_triton() -> None:
    code = "import sys, shiva_kernels.tables; print({'torch', 'triton'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
