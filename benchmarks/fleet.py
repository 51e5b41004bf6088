# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`make paper`: every policy on the published settings, and how near the bound each comes.

python -m benchmarks.fleet [--jobs N] [--seeds N] [--full] [--optimum]. Each row goes to its CSV
under benchmarks/results/fleet/ as soon as it is there; what a CSV already has is not run again
(`--fresh` begins anew). The tables in summary.md are made from the CSVs.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from benchmarks.fleet_rows import (
    BASELINES,
    BURST_SETTINGS,
    DEDICATED,
    DIFLOW,
    OURS,
    RESULTS,
    ROWS,
    SHIFTED,
    Task,
    run_task,
)
from benchmarks.fleet_tables import path_of, read_rows, summary_of, write_summary
from kubediffusion.simulate.settings import SETTINGS

# ------------------------------------------------------------------ which, and their files


def headline(seeds: Sequence[int], policies: Sequence[str]) -> Iterator[Task]:
    for policy in policies:
        for setting in SETTINGS:
            for seed in seeds:
                yield Task("rates", setting, policy, seed)


def bursts(seeds: Sequence[int], policies: Sequence[str]) -> Iterator[Task]:
    for policy in policies:
        for setting in BURST_SETTINGS:
            for seed in seeds:
                yield Task("bursts", setting, policy, seed)


def fleets(seeds: Sequence[int], policies: Sequence[str]) -> Iterator[Task]:
    """The load is what the best of the partitioned and swapping baselines carries."""
    rates = summary_of("rates", "overall")
    for policy in policies:
        for setting in BURST_SETTINGS:
            best = max(
                rates.get((setting, each, ""), [0.0])[0]
                for each in ("diffusers", "shepherd", "clockwork")
            )
            for seed in seeds:
                yield Task("gpus", setting, policy, seed, load=best)


VARIATIONS: dict[str, tuple[str, ...]] = {
    "shiva-0.6": ("kubediffusion",),
    "pinned": ("kubediffusion",),
    "grpc": ("kubediffusion",),
    "one-gpu-lost": ("kubediffusion",),
    "three-gateways": ("kubediffusion",),
    "noise-0.1": ("kubediffusion",),
    "lean": ("kubediffusion",),
    "dedicated": (DEDICATED,),
    "600s": ("kubediffusion", "kubediffusion-fair", "shepherd", "clockwork-aware"),
}


def grid(seeds: Sequence[int]) -> Iterator[Task]:
    """What else a fleet may be, and the steady state: 600 s, on two seeds."""
    for variant, policies in VARIATIONS.items():
        for policy in policies:
            for setting in SETTINGS:
                for seed in seeds[: 2 if variant == "600s" else 3]:
                    yield Task("grid", setting, policy, seed, variant)


def days(seeds: Sequence[int]) -> Iterator[Task]:
    for variant in ("always", "10", "30", "60", "120"):
        for setting in SETTINGS:
            for seed in seeds[:2]:
                yield Task("autoscale", setting, "kubediffusion", seed, variant)


def shifts(seeds: Sequence[int]) -> Iterator[Task]:
    for family in SHIFTED:
        for seed in seeds[:3]:
            yield Task("shift", "S-d", "kubediffusion", seed, family)


def _append(table: str, row: Mapping[str, Any]) -> None:
    path = path_of(table)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def run_all(tasks: Iterable[Task], jobs: int) -> None:
    tasks = list(tasks)
    done = {
        (table, row["setting"], row["policy"], row["seed"], row["variant"])
        for table in {task.table for task in tasks}
        for row in read_rows(table)
    }
    left = [task for task in tasks if (task.table, *task.key) not in done]
    print(f"{len(left)} of {len(tasks)} rows to do", flush=True)
    with ProcessPoolExecutor(jobs) as pool:
        running = {pool.submit(run_task, task): task for task in left}
        for future in as_completed(running):
            task = running[future]
            row = future.result()
            _append(task.table, row)
            print(task.table, *row.values(), flush=True)
    for table in {task.table for task in tasks}:
        _sort(table)


def _sort(table: str) -> None:
    rows = read_rows(table)
    order = ["bound", *OURS, *BASELINES, *DIFLOW, DEDICATED]
    rows.sort(key=lambda r: (r["setting"], r["variant"], order.index(r["policy"]), int(r["seed"])))
    path_of(table).unlink(missing_ok=True)
    for row in rows:
        _append(table, row)


def write_optimum(seeds: Sequence[int]) -> None:
    from benchmarks.fleet_optimum import rows

    path_of("optimum").unlink(missing_ok=True)
    for row in rows(seeds):
        _append("optimum", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="the grid of variations too")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    parser.add_argument("--optimum", action="store_true", help="small instances only")
    asked = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    seeds = list(range(asked.seeds))
    random.seed(0)
    if asked.optimum:
        write_optimum(seeds)
    else:
        if asked.fresh:
            for table in ROWS:
                path_of(table).unlink(missing_ok=True)
        run_tables(seeds, asked.jobs, full=asked.full)
    write_summary()
    print((RESULTS / "summary.md").read_text())


def run_tables(seeds: Sequence[int], jobs: int, *, full: bool) -> None:
    quick = ("kubediffusion", "diffusers", "shepherd", "clockwork-aware")
    run_all(headline(seeds, ("bound", *OURS, *BASELINES)), jobs)
    run_all(bursts(seeds, quick), jobs)
    run_all(fleets(seeds, quick), jobs)
    run_all(headline(seeds, DIFLOW), jobs)
    run_all(bursts(seeds[:3], DIFLOW[1:]), jobs)
    run_all(fleets(seeds[:3], DIFLOW[:1]), jobs)
    if full:
        run_all(grid(seeds), jobs)
        run_all(days(seeds), jobs)
        run_all(shifts(seeds), jobs)
        write_optimum(seeds)


if __name__ == "__main__":
    main()
