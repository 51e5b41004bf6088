# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`make bench`: every suite, a table, CSV and a plot under benchmarks/results/.

python -m benchmarks.run [--rounds N] [--suite NAME …]
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import math
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, Row, machine, read_csv, write_csv

SUITES = {
    "exact": "benchmarks.exact:run",
    "tensors": "benchmarks.tensors:run",
    "pruning": "benchmarks.pruning:run",
    "pruning-start": "benchmarks.pruning_start:run",
    "pruning-training": "benchmarks.pruning_training:run",
    "pruning-service": "benchmarks.pruned_service:run",
    "step-cache": "benchmarks.step_cache:run",
    "overhead": "benchmarks.overhead:run",
    "latency": "benchmarks.side_by_side:run_latency",
    "fastapi": "benchmarks.side_by_side:run_fastapi",
    "ray-serve": "benchmarks.side_by_side:run_ray",
}


def table(rows: Sequence[Row]) -> Table:
    out = Table(title=machine(), title_justify="left", show_lines=False)
    for column in ("suite", "what", "ours", "peer", "unit", "ratio", "goal", ""):
        out.add_column(column, justify="right" if column in ("ours", "peer", "ratio") else "left")
    for row in rows:
        mark = {True: "[green]reached", False: "[red]not reached", None: ""}[row.reached]
        ratio = "" if math.isnan(row.ratio) else f"{row.ratio:.3f}"
        out.add_row(
            row.suite,
            row.name + (f" ({row.note})" if row.note else ""),
            f"{row.ours:.4g}",
            f"{row.peer:.4g}",
            row.unit,
            ratio,
            row.goal,
            mark,
        )
    return out


def plot(rows: Sequence[Row], title: str) -> None:
    """A bar for each ratio and a tick where its goal is. Counts of equal pictures are no ratios."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.suite != "exact" and not math.isnan(row.ratio)]
    if not shown:
        return
    fig, ax = plt.subplots(figsize=(10, 0.36 * len(shown) + 1.4), constrained_layout=True)
    colors = {True: "#2a7f4f", False: "#b8432f", None: "#999999"}
    names = [f"{row.name} {'>' if row.unit.endswith('/s') else '<'}" for row in shown]
    ax.barh(names, [r.ratio for r in shown], color=[colors[r.reached] for r in shown], height=0.6)
    for y, row in enumerate(shown):
        text = f"{row.ratio:.2f}   {row.ours:.3g} {row.unit}"
        ax.text(row.ratio + 0.02, y, text, va="center", fontsize=8)
        goal = re.fullmatch(r"ratio [<>]= ([\d.]+)", row.goal)
        if goal:
            ax.vlines(float(goal[1]), y - 0.42, y + 0.42, color="black", linewidth=1.6)
    ax.axvline(1, color="black", linewidth=0.6, linestyle=":")
    ax.invert_yaxis()
    ax.set_xlim(0, max(row.ratio for row in shown) * 1.2)
    ax.margins(y=0.01)
    ax.set_xlabel("ours / peer, of medians of one run; < less is better, > more is better; | goal")
    ax.set_title(title, fontsize=9, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(RESULTS / "bench.png", dpi=110)


def _results_of(suite: str) -> Path:
    return RESULTS / f"{suite}.csv"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="measured pairs of each comparison")
    parser.add_argument("--suite", action="append", choices=[*SUITES], help="only these suites")
    args = parser.parse_args()
    console = Console()
    run = f"{datetime.date.today()}  {_commit()}  {machine()}"
    rows: list[Row] = []
    chosen = args.suite or [*SUITES]
    for i, name in enumerate(chosen, 1):
        console.print(f"[bold]({i}/{len(chosen)}) {name}[/]")
        module, function = SUITES[name].split(":")
        new = getattr(importlib.import_module(module), function)(args.rounds)
        write_csv(new, _results_of(name), run)
        console.print(table(new))
        rows += new
    plot([row for name in SUITES for row in read_csv(_results_of(name))], machine())
    missed = [row.name for row in rows if row.reached is False]
    console.print(f"{len(rows)} comparisons, {len(missed)} goals not reached", *missed, sep="\n  ")


if __name__ == "__main__":
    main()
