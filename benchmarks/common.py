# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A measured comparison, and how it is written down.

The machines this runs on are shared and noisy: a single absolute time says little. So each suite
measures us and the peer in turn within one run, and what counts is the ratio of the medians.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One comparison. `ours` and `peer` are medians in `unit`; `ratio` is ours / peer."""

    suite: str
    name: str
    ours: float
    peer: float
    unit: str
    goal: str  # as the issue words it: "ratio <= 1.03", "ours <= 10 ms", or "" for context
    reached: bool | None
    rounds: int
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.ours / self.peer if self.peer else float("nan")


def timed(call: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(
    ours: Callable[[], float], peer: Callable[[], float], rounds: int, warmup: int = 1
) -> tuple[list[float], list[float]]:
    """Each callable returns its own figure; A B, B A, A B, … so that drift falls on both."""
    for _ in range(warmup):
        ours()
        peer()
    a: list[float] = []
    b: list[float] = []
    for i in range(rounds):
        for call, out in ((ours, a), (peer, b))[:: 1 if i % 2 == 0 else -1]:
            out.append(call())
    return a, b


def at_most(
    suite: str,
    name: str,
    ours: Sequence[float],
    peer: Sequence[float],
    unit: str,
    limit: float,
    note: str = "",
) -> Row:
    """A row whose goal is median(ours) <= limit * median(peer)."""
    a, b = statistics.median(ours), statistics.median(peer)
    return Row(suite, name, a, b, unit, f"ratio <= {limit:g}", a <= limit * b, len(ours), note)


def at_least(
    suite: str,
    name: str,
    ours: Sequence[float],
    peer: Sequence[float],
    unit: str,
    limit: float,
    note: str = "",
) -> Row:
    """A row whose goal is median(ours) >= limit * median(peer)."""
    a, b = statistics.median(ours), statistics.median(peer)
    return Row(suite, name, a, b, unit, f"ratio >= {limit:g}", a >= limit * b, len(ours), note)


def machine() -> str:
    """The machine in a line, for the head of every result."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    python = platform.python_version()
    return f"{model}, {os.cpu_count()} CPUs, Python {python}, OMP_NUM_THREADS={threads}"


def write_csv(rows: Sequence[Row], path: Path, run: str) -> None:
    """`run` says when, on which commit, and where: a suite may be run alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        names = [*Row.__dataclass_fields__, "ratio", "run"]
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        for row in rows:
            writer.writerow({**asdict(row), "ratio": f"{row.ratio:.4f}", "run": run})


def read_csv(path: Path) -> list[Row]:
    """What `write_csv` wrote; nothing where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return [_row(fields) for fields in csv.DictReader(f)]


def _row(fields: dict[str, str]) -> Row:
    return Row(
        fields["suite"],
        fields["name"],
        float(fields["ours"]),
        float(fields["peer"]),
        fields["unit"],
        fields["goal"],
        {"True": True, "False": False}.get(fields["reached"]),
        int(fields["rounds"]),
        fields["note"],
    )
