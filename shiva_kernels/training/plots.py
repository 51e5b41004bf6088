# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a training: curves, keep ratios, what is kept of an image, quality against speed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from shiva_kernels.config import KeepMap
from shiva_kernels.errors import ShivaError
from shiva_kernels.tables import KTable
from shiva_kernels.training.logs import read_log

NOT_LOSSES = ("step", "stage", "keep_ratio", "gradient_norm", "budget_mean")


def training_curves(log: Path, out: Path) -> Path:
    """Losses of every stage, and the mean keep ratio, over optimiser steps.

    Raises:
        ShivaError: the log is empty or not there.
    """
    rows = read_log(log)
    if not rows:
        raise ShivaError(f"{log}: no training log there; train first")
    figure, (losses, ratio) = plt.subplots(2, 1, figsize=(6, 5), sharex=True)
    for name in (column for column in rows[0] if column not in NOT_LOSSES):
        steps, values = _column(rows, name)
        losses.plot(steps, values, label=name)
    ratio.plot(*_column(rows, "keep_ratio"), label="keep ratio of the batch")
    if "budget_mean" in rows[0]:
        ratio.plot(*_column(rows, "budget_mean"), label="running mean")
    changes = [float(b["step"]) for a, b in itertools.pairwise(rows) if a["stage"] != b["stage"]]
    for axes in (losses, ratio):
        for step in changes:
            axes.axvline(step, color="grey", linewidth=0.7, linestyle=":")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)
    losses.set(ylabel="loss", yscale="symlog")
    ratio.set(xlabel="optimiser step", ylabel="ratio", ylim=(0, 1.02))
    return _save(figure, out)


def _column(rows: Sequence[Mapping[str, str]], name: str) -> tuple[list[float], list[float]]:
    given = [row for row in rows if row.get(name)]
    return [float(row["step"]) for row in given], [float(row[name]) for row in given]


def keep_ratios(table: KTable, out: Path) -> Path:
    """The share of tokens that each block keeps at each noise level."""
    ratios = np.array(table.k, dtype=np.float64).T / table.tokens
    figure, axes = plt.subplots(figsize=(7, 3))
    image = axes.imshow(ratios, aspect="auto", vmin=0, vmax=1, cmap="viridis", origin="lower")
    ticks = np.linspace(0, len(table.sigmas) - 1, min(8, len(table.sigmas))).round().astype(int)
    axes.set_xticks(ticks, [f"{table.sigmas[i]:.2f}" for i in ticks])
    title = f"budget {table.budget:g}: mean {table.mean_keep_ratio:.3f} without block 0"
    axes.set(xlabel="noise level (first step on the left)", ylabel="block", title=title)
    figure.colorbar(image, label="keep ratio")
    return _save(figure, out)


def keep_maps(
    picture: NDArray[np.uint8], maps: Sequence[KeepMap], side: int, out: Path, *, image: int = 0
) -> Path:
    """The picture [h, w, 3] once for each (noise level, block), rejected tokens darkened.

    `side` is how many tokens the picture is wide.
    """
    sigmas = sorted({entry.sigma for entry in maps}, reverse=True)
    blocks = sorted({entry.block for entry in maps})
    shape = (len(sigmas), len(blocks))
    size = (1.3 * shape[1] + 0.6, 1.3 * shape[0] + 0.4)
    figure, grid = plt.subplots(*shape, figsize=size, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for entry in maps:
        axes = grid[sigmas.index(entry.sigma), blocks.index(entry.block)]
        kept = np.zeros(entry.tokens, dtype=bool)
        kept[entry.index[image].cpu().numpy()] = True
        axes.imshow(shaded(picture, kept.reshape(-1, side)))
        axes.set_title(f"{len(entry.index[image])}", fontsize=6, pad=1)
    for row, sigma in enumerate(sigmas):
        grid[row, 0].set_ylabel(f"noise {sigma:.2f}", fontsize=7)
    for column, block in enumerate(blocks):
        grid[-1, column].set_xlabel(f"block {block}", fontsize=7)
    return _save(figure, out)


def shaded(picture: NDArray[np.uint8], kept: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Rejected tokens at a quarter of their brightness, on grey; kept [rows, columns]."""
    rows, columns = picture.shape[0] // kept.shape[0], picture.shape[1] // kept.shape[1]
    share = np.where(np.kron(kept, np.ones((rows, columns))) > 0, 1.0, 0.25)[..., None]
    return np.rint(picture * share + 90 * (1 - share)).astype(np.uint8)


def quality_against_speed(
    points: Mapping[str, tuple[float, float]], out: Path, *, quality: str
) -> Path:
    """Arms as (speed-up over dense, quality)."""
    figure, axes = plt.subplots(figsize=(5, 4))
    for name, (speed, value) in points.items():
        axes.scatter(speed, value, s=25)
        axes.annotate(name, (speed, value), fontsize=8, xytext=(4, 3), textcoords="offset points")
    axes.set(xlabel="speed-up over dense", ylabel=quality)
    axes.grid(visible=True, alpha=0.3)
    return _save(figure, out)


def arm_bars(
    values: Mapping[str, tuple[float, float, float]], out: Path, *, label: str, title: str
) -> Path:
    """Arms with a mean, and the ends of its interval."""
    names = sorted(values, key=lambda name: values[name][0])
    means = np.array([values[name][0] for name in names])
    ends = np.array([values[name][1:] for name in names])
    figure, axes = plt.subplots(figsize=(6, 0.4 * len(names) + 1.2))
    spread = np.abs(ends.T - means)
    axes.barh(names, means, xerr=spread, color="steelblue", height=0.6, capsize=2)
    axes.set(xlabel=label, title=title)
    axes.grid(visible=True, axis="x", alpha=0.3)
    return _save(figure, out)


def _save(figure: Figure, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(out, dpi=90)
    plt.close(figure)
    return out
