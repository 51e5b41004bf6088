# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals for arms that saw the same samples: paired, and by clusters.

Pictures of one prompt with several seeds are not independent, so whole prompts are drawn. Paired,
because both arms drew the same prompts with the same noise: what is resampled is the difference.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
_CHUNK = 500  # resamples at once: memory of a chunk is _CHUNK x clusters numbers


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided percentile interval, and both one-sided bounds of that level.

    `above_zero` is the share of resamples above 0, half of those equal to it.
    """

    mean: float
    low: float
    high: float
    lower_bound: float
    upper_bound: float
    above_zero: float
    clusters: int
    level: float = 0.95

    def as_dict(self) -> dict[str, float]:
        """For a report."""
        return {name: round(float(value), 8) for name, value in asdict(self).items()}


def bootstrap_mean(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean of `values` [n] with percentile intervals; `clusters` [n]: what goes together."""
    sums, counts = _cluster_totals(np.asarray(values, dtype=np.float64), clusters)
    rng = np.random.default_rng(seed)
    means: list[NDArray[np.float64]] = []
    for start in range(0, resamples, _CHUNK):
        size = (min(_CHUNK, resamples - start), len(sums))
        drawn = rng.integers(0, len(sums), size)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    drawn_means = np.concatenate(means)
    tail = (1 - level) / 2
    low, high = np.quantile(drawn_means, [tail, 1 - tail])
    lower, upper = np.quantile(drawn_means, [1 - level, level])
    above = float((drawn_means > 0).mean() + (drawn_means == 0).mean() / 2)
    mean = float(sums.sum() / counts.sum())
    return Interval(mean, low, high, lower, upper, above, len(sums), level)


def paired_difference(
    ours: ArrayLike,
    theirs: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean of `ours - theirs` over the same samples, [n] each, resampled by clusters.

    Raises:
        ValueError: the arms did not see the same number of samples.
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired arms need equal lists of numbers, got {a.shape} and {b.shape}")
    return bootstrap_mean(a - b, clusters, resamples=resamples, level=level, seed=seed)


def _cluster_totals(
    values: NDArray[np.float64], clusters: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if values.ndim != 1 or not len(values):
        raise ValueError(f"a bootstrap needs a list of numbers, got shape {values.shape}")
    if clusters is None:
        return values, np.ones(len(values))
    names = np.asarray(clusters)
    if names.shape != values.shape:
        raise ValueError(f"{len(values)} values, but {names.shape} cluster names")
    _, index = np.unique(names, return_inverse=True)
    sums = np.bincount(index, values).astype(np.float64)
    return sums, np.bincount(index).astype(np.float64)


def kernel_distance(ours: ArrayLike, theirs: ArrayLike) -> float:
    """The squared maximum mean discrepancy of KID: kernel (x.y / d + 1)^3, unbiased estimate.

    `ours` [n, d] and `theirs` [m, d] are features. Binkowski et al., arXiv 1801.01401.
    """
    x, y = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features must be [n >= 2, d] twice, got {x.shape} and {y.shape}")
    own = _mean_off_diagonal(_polynomial(x, x)) + _mean_off_diagonal(_polynomial(y, y))
    return float(own - 2 * _polynomial(x, y).mean())


def _polynomial(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_off_diagonal(gram: NDArray[np.float64]) -> float:
    n = len(gram)
    return float((gram.sum() - np.trace(gram)) / (n * (n - 1)))
