# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a run tells: a CSV of every logged step, TensorBoard where it is installed, a bar."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class CsvLog:
    """Rows of numbers; a restart drops what the restored checkpoint has not seen."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        self.path = path
        rows = [row for row in read_log(path) if int(row["step"]) <= after_step]
        self._columns = list(rows[0]) if rows else []
        path.parent.mkdir(parents=True, exist_ok=True)
        if rows:
            self._write(rows)
        else:
            path.unlink(missing_ok=True)

    def write(self, step: int, values: Mapping[str, float], **labels: str) -> None:
        """Add a row. It may leave names out, and bring new ones, as a new stage does."""
        row: dict[str, Any] = {"step": step, **labels}
        row |= {name: f"{value:.6g}" for name, value in values.items()}
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._write([*read_log(self.path), row])
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


def read_log(path: Path) -> list[dict[str, str]]:
    """All rows of a log, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Means:
    """Means of named numbers since they were last taken."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values = {}
        return means


def trackers() -> list[str]:
    """What accelerate should log to besides: TensorBoard, where it is installed."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError:  # not installed, or not whole: the CSV has the same numbers
        return []
    return ["tensorboard"]


class Bar:
    """One line of progress; silent where nobody looks."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, note: str = "") -> None:
        self._progress.update(self._task, advance=1, note=note)


@contextmanager
def progress_bar(title: str, total: int, done: int = 0, *, shown: bool = True) -> Iterator[Bar]:
    """A bar on a terminal's standard error."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bars:
        yield Bar(bars, bars.add_task(title, total=total, completed=done, note=""))
