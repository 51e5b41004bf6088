# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Draw the training logs."""

import csv
import shutil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CURVES = {
    "vae_decoder": ("crop", "whole"),
    "vae_encoder": ("crop", "whole"),
    "reading": ("loss",),
    "flow128": ("mse", "class_loss", "reading_loss"),
    "flow256": ("mse", "class_loss", "reading_loss"),
    "controlnet": ("mse",),
    "lora": ("mse",),
}


def draw_curves(logs: Path, results: Path) -> None:
    """Copy every log beside a picture of its losses."""
    results.mkdir(parents=True, exist_ok=True)
    for name, columns in CURVES.items():
        source = logs / f"{name}.csv"
        if not source.exists():
            continue
        shutil.copy(source, results / source.name)
        with source.open(newline="") as file:
            rows = list(csv.DictReader(file))
        figure, axes = plt.subplots(figsize=(5, 3))
        for column in (column for column in columns if column in rows[0]):
            points = [(float(row["step"]), float(row[column])) for row in rows if row[column]]
            axes.plot(*zip(*points, strict=True), label=column)
        axes.set(xlabel="step", title=name, yscale="log")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(results / f"{name}.png", dpi=80)
        plt.close(figure)
