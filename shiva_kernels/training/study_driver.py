# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the parts of the study in order, draws their figures, and stops at its CPU budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from shiva_kernels.errors import ShivaError
from shiva_kernels.training import plots
from shiva_kernels.training.config import read_yaml
from shiva_kernels.training.runs import CpuBudget, OutOfTime, Place, Runs
from shiva_kernels.training.study import Scale, Study

PARTS = ("A", "B", "C", "D")


def run_study(
    *,
    results: Path,
    runs: Path,
    pipeline: Path,
    trainer: Path,
    transformer: Path | None = None,
    parts: Sequence[str] | None = None,
    scale_file: Path | None = None,
    cpu_hours: float = 6.0,
    pixels: int = 256,
    say: Callable[[str], None] = print,
) -> Iterator[tuple[str, Path]]:
    """Do the parts asked for, yielding each part's figure when it is there.

    Raises:
        ShivaError: no such part, or a scale that cannot be read.
        OutOfTime: the CPU hours are used up; every finished run is kept.
    """
    wanted = [part.upper() for part in parts or PARTS]
    if unknown := [part for part in wanted if part not in PARTS]:
        raise ShivaError(f"no part {', '.join(unknown)}: the study has {', '.join(PARTS)}")
    scale = read_yaml(Scale, scale_file) if scale_file is not None else Scale()
    place = Place(runs, pipeline, transformer, trainer, pixels)
    budget = CpuBudget(runs / "cpu.json", cpu_hours)
    study = Study(Runs(place, budget, say), results, scale)
    steps: dict[str, Callable[[], Path]] = {
        "A": lambda: _screen(study),
        "B": lambda: _arms(study),
        "C": lambda: _pictures(study),
        "D": lambda: _budgets(study),
    }
    try:
        for part in PARTS:
            if part in wanted:
                yield part, steps[part]()
    finally:
        budget.note()


def _screen(study: Study) -> Path:
    report = study.screen()
    base = report["arms"]["random"]["mse"]
    bars = {"random": (base, base, base)}
    for name, row in report["against_random"].items():
        mse = report["arms"][name]["mse"]
        bars[name] = (mse, base + row["low"], base + row["high"])
    return plots.arm_bars(
        bars,
        study.results / "screen.png",
        label="velocity MSE to dense (95 % of the difference to random)",
        title=f"A: router only, ratio 0.6, {report['samples']} samples",
    )


def _arms(study: Study) -> Path:
    report = study.train_arms()
    bars = {
        name: (row["to_dense"], min(row["to_dense_by_seed"]), max(row["to_dense_by_seed"]))
        for name, row in report["arms"].items()
    }
    return plots.arm_bars(
        bars,
        study.results / "arms.png",
        label="velocity MSE to dense (lowest and highest training seed)",
        title="B: trained arms at 0.6",
    )


def _pictures(study: Study) -> Path:
    report = study.pictures()
    base = report["arms"]["dense"]["right"]
    bars = {"dense": (base, base, base)}
    for name, row in report["right_against_dense"].items():
        share = report["arms"][name]["right"]
        bars[name] = (share, base + row["low"], base + row["high"])
    return plots.arm_bars(
        bars,
        study.results / "pictures.png",
        label="pictures right (95 % of the difference to dense)",
        title=f"C: {report['prompts']} prompts x {report['seeds']} seeds",
    )


def _budgets(study: Study) -> Path:
    report = study.budgets()
    points = {
        budget: (1 / float(budget), row["right"]) for budget, row in report["budgets"].items()
    }
    return plots.quality_against_speed(
        points, study.results / "budgets.png", quality="pictures right (x: 1 / budget)"
    )


__all__ = ["PARTS", "OutOfTime", "run_study"]
