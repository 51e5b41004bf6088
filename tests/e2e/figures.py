# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What the end-to-end tests measured: a table at the end, and benchmarks/results/e2e.csv."""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.common import RESULTS, machine

FILE = RESULTS / "e2e.csv"


@dataclass(frozen=True)
class Figure:
    """`goal` is empty for what has none; `run` says when, on which commit, and where."""

    what: str
    figure: float
    unit: str
    goal: str = ""
    reached: bool | None = None
    run: str = ""


class Figures:
    """Of one session."""

    def __init__(self) -> None:
        self.rows: dict[str, Figure] = {}

    def add(self, what: str, figure: float, unit: str = "s", at_most: float | None = None) -> None:
        """A figure beyond its goal is told, and fails no test: machines differ."""
        goal = "" if at_most is None else f"at most {at_most:g} {unit}"
        reached = None if at_most is None else figure <= at_most
        self.rows[what] = Figure(what, round(figure, 2), unit, goal, reached, _run())

    def lines(self) -> list[str]:
        words = {True: "reached", False: "NOT REACHED", None: ""}
        return [
            f"{row.what:<70} {row.figure:>8g} {row.unit:<10} {row.goal:<18} {words[row.reached]}"
            for row in self.rows.values()
        ]

    def write(self, file: Path = FILE) -> None:
        """Others' rows stay: a part of the tests may be run alone."""
        rows = {**{row["what"]: row for row in _read(file)}}
        rows |= {
            row.what: {name: str(value) for name, value in asdict(row).items()}
            for row in self.rows.values()
        }
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, [field.name for field in fields(Figure)])
            writer.writeheader()
            writer.writerows(rows.values())


def _read(file: Path) -> Iterable[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as f:
        return list(csv.DictReader(f))


def _run() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"{datetime.date.today()}  {commit}  {machine()}"
