# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals and the kernel distance, against what theory says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from shiva_kernels.training.statistics import bootstrap_mean, kernel_distance, paired_difference


def test_the_interval_is_the_normal_one_for_many_samples() -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, 2000)
    found = bootstrap_mean(values)
    low, high = stats.norm.interval(0.95, values.mean(), values.std() / np.sqrt(2000))
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    assert found.low < found.lower_bound < found.mean < found.upper_bound < found.high


def test_scipy_agrees() -> None:
    values = np.random.default_rng(1).exponential(1.0, 60)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    ours = bootstrap_mean(values, resamples=20_000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_clusters_widen_the_interval() -> None:
    rng = np.random.default_rng(3)
    prompts = np.repeat(np.arange(100), 3)
    values = rng.normal(0, 1, 100)[prompts] + rng.normal(0, 0.1, 300)
    alone, together = bootstrap_mean(values), bootstrap_mean(values, prompts)
    ratio = (together.high - together.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(np.sqrt(3), rel=0.15)
    assert together.clusters == 100


def test_pairing_sees_what_noise_hides() -> None:
    rng = np.random.default_rng(4)
    shared = rng.normal(0, 10, 500)
    ours, theirs = shared + rng.normal(-0.1, 0.1, 500), shared + rng.normal(0, 0.1, 500)
    assert paired_difference(ours, theirs).high < 0
    assert bootstrap_mean(ours).high > bootstrap_mean(theirs).low


def test_equal_arms_are_no_evidence() -> None:
    same = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.mean, same.low, same.high, same.above_zero) == (0, 0, 0, 0.5)


def test_unequal_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="equal lists"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="cluster names"):
        bootstrap_mean([1.0, 2.0], [1])


def test_kernel_distance_tells_distributions_apart() -> None:
    rng = np.random.default_rng(5)
    one, same = rng.normal(0, 1, (2, 400, 8))
    other = rng.normal(0.5, 1, (400, 8))
    assert abs(kernel_distance(one, same)) < 0.05
    assert kernel_distance(one, other) > 0.3
