# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What every training stage shares: a time budget that survives restarts, logs, checkpoints."""

import csv
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

PIXELS = 128
VAE_FACTOR = 8
PATCH = 2
CHANNELS = 16


def to_tensor(images: NDArray[np.uint8]) -> torch.Tensor:
    """(n, h, w, 3) bytes as (n, 3, h, w) floats in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_images(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The way back from `to_tensor`."""
    scaled = tensor.float().clamp(-1, 1).add(1).mul(127.5).round()
    return scaled.byte().permute(0, 2, 3, 1).contiguous().numpy()


@dataclass
class Budget:
    """Training time, so that a schedule ends on time on a machine of any speed.

    Time spent before a restart counts: `spent` goes into the checkpoint.
    """

    minutes: float
    spent: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, earlier runs included."""
        return self.spent + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """0 at the start, 1 when the time is used up."""
        return min(1.0, self.elapsed / (60 * self.minutes)) if self.minutes > 0 else 1.0

    def left(self) -> str:
        """Time left, for people."""
        seconds = max(0, round(60 * self.minutes - self.elapsed))
        return f"{seconds // 60}:{seconds % 60:02d} left"


def flat_then_linear(progress: float, flat: float = 0.5) -> float:
    """The learning rate's share: 1, then down to (almost) 0 in a straight line."""
    return 1.0 if progress < flat else max(0.01, (1 - progress) / (1 - flat))


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Set every group's learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


class CurveLog:
    """Rows of numbers in a CSV file, and one plain line each on the terminal."""

    def __init__(self, path: Path, name: str, *, append: bool) -> None:
        self.path, self.name = path, name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not append:
            path.unlink(missing_ok=True)

    def write(self, budget: Budget, **row: float) -> None:
        """Add a row; the first row's names become the header."""
        row = {"seconds": round(budget.elapsed, 1), **row}
        fresh = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(row)
            writer.writerow([f"{value:.5g}" for value in row.values()])
        numbers = " ".join(f"{key} {value:.4g}" for key, value in row.items())
        print(f"{self.name}: {numbers} ({budget.left()})", flush=True)


class Averages:
    """Running sums between two log lines."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, **values: float) -> None:
        """Count one value of each name."""
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
            self._counts[key] = self._counts.get(key, 0) + 1

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        means = {key: total / self._counts[key] for key, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write beside the old file, then rename: a kill leaves the old one whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint, if there is one."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless index batches, every item once an epoch."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)
