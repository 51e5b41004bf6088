# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`make paper`: every policy on the published settings, and how near the bound each comes.

python -m benchmarks.fleet [--jobs N] [--seeds N] [--full]. Each row goes to its CSV under
benchmarks/results/fleet/ as soon as it is there; what a CSV already has is not run again
(`--fresh` begins anew). The tables in summary.md are made from the CSVs.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

from kubediffusion.cli.simulate import published_data, read_json
from kubediffusion.simulate.bound import best_attainment, reaches_by_family
from kubediffusion.simulate.outcome import Fault, Options
from kubediffusion.simulate.scenario import Result, Scenario, jobs_for, simulate
from kubediffusion.simulate.settings import (
    SETTINGS,
    costs_of,
    published_setting,
    tables_of,
)
from kubediffusion.simulate.sweep import largest_rate, sweep_burst, sweep_gpus
from kubediffusion.simulate.workload import parse_trace

RESULTS = Path(__file__).parent / "results" / "fleet"
SHARE = 0.9
BASELINES = ("diffusers", "shepherd", "clockwork", "clockwork-aware")
OURS = ("kubediffusion", "kubediffusion-fair")
DIFLOW = ("diflow", "diflow-no-abort")
BURST_SETTINGS = ("S-a", "S-b", "S-c", "S-d", "S-e")
# Where the searches begin; they may end anywhere.
GUESS = {
    "kubediffusion": (5.4, 4.8, 5.0, 3.4, 7.0, 1.55, 1.22),
    "kubediffusion-fair": (5.4, 4.8, 4.7, 2.8, 6.0, 1.55, 1.22),
    "diffusers": (3.3, 3.1, 2.0, 0.5, 2.1, 1.0, 0.85),
    "shepherd": (3.3, 3.1, 3.2, 1.3, 3.1, 1.0, 0.95),
    "clockwork": (0.1, 0.8, 0.3, 0.1, 0.1, 0.8, 0.85),
    "clockwork-aware": (3.8, 4.3, 3.6, 1.4, 3.3, 1.1, 1.0),
    "diflow": (3.7, 2.7, 2.5, 0.7, 1.8, 0.9, 0.85),
    "diflow-no-abort": (4.4, 3.0, 2.5, 0.7, 1.8, 1.1, 1.0),
    "bound": (5.8, 5.3, 5.6, 4.2, 8.8, 1.7, 1.35),
}
# The mark: what a throw-away simulator reached with its own policy (every family by itself), and
# the share of the bound, least and hoped for.
MARKS = {
    "S-a": (5.6, 92, 95), "S-b": (5.0, 90, 94), "S-c": (4.8, 89, 93), "S-d": (3.1, 75, 86),
    "S-e": (6.1, 80, 88), "S-f": (1.65, 91, 94), "S-g": (1.28, 89, 92),
}  # fmt: skip


@lru_cache(maxsize=1)
def _data() -> tuple[Any, Any, Any]:
    folder = published_data()
    costs = costs_of(
        read_json(folder / "model_profiles.json"), read_json(folder / "transfer_profiles.json")
    )
    tables = tables_of(read_json(folder / "scheduler_tables.json"))
    return costs, tables, parse_trace((folder / "trace_rs1.0_t120.txt").read_text())


def scenario(setting: str, policy: str, seed: int, **more: Any) -> Scenario:
    costs, tables, trace = _data()
    options = more.pop("options", Options(seed=seed))
    return Scenario(
        published_setting(setting), costs, trace, policy,
        seed=seed, tables=tables, options=options, **more,
    )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One row of one table."""

    table: str
    setting: str
    policy: str
    seed: int
    variant: str = ""
    load: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.setting, self.policy, str(self.seed), self.variant)


# ------------------------------------------------------------------ rows


def _rate_row(task: Task, **more: Any) -> dict[str, Any]:
    """The largest rates at which all requests, and every family by itself, are 90 % on time."""
    seen: dict[float, Result] = {}

    def result(rate: float) -> Result:
        if rate not in seen:
            base = scenario(task.setting, task.policy, task.seed, **more)
            seen[rate] = simulate(replace(base, rate=rate))
        return seen[rate]

    guess = GUESS[task.policy][SETTINGS.index(task.setting)]
    overall = largest_rate(lambda rate: result(rate).attainment >= SHARE - 1e-9, guess)
    family = overall
    if len(published_setting(task.setting).families.pipelines) > 1:
        family = largest_rate(lambda rate: result(rate).worst_family >= SHARE - 1e-9, guess)
    return {"overall": overall, "family": family}


def _bound_row(task: Task) -> dict[str, Any]:
    costs, _, _ = _data()
    base = scenario(task.setting, "diffusers", task.seed)
    least = {p.name: p.least_seconds(costs) for p in base.setting.families.all()}

    def work(job: Any) -> float:
        return least[job.pipeline.name]

    def overall(rate: float) -> bool:
        jobs = jobs_for(replace(base, rate=rate))
        return best_attainment(jobs, work, base.nodes) >= SHARE - 1e-9

    def family(rate: float) -> bool:
        return reaches_by_family(jobs_for(replace(base, rate=rate)), work, base.nodes, SHARE)

    guess = GUESS["bound"][SETTINGS.index(task.setting)]
    return {"overall": largest_rate(overall, guess), "family": largest_rate(family, guess * 0.8)}


def _burst_row(task: Task) -> dict[str, Any]:
    """One workflow (the first family's second ControlNet) over a base load of 20 % of what best
    batches can serve."""
    costs, _, trace = _data()
    base = scenario(task.setting, task.policy, task.seed, arrivals="poisson")
    mix = base.setting.families.mix()
    labels = dict(_label_shares())
    mean_work = sum(
        mix[family] * labels[label] * pipeline.least_seconds(costs)
        for family, pipelines in base.setting.families.pipelines.items()
        for label, pipeline in pipelines.items()
    )
    own_rate = len(trace.arrivals) / trace.seconds
    rate = 0.2 * base.nodes / mean_work / own_rate
    first = next(iter(base.setting.families.pipelines))
    base = replace(base, rate=rate)
    return {
        "one": sweep_burst(base, "C", family=first),
        "mixed": sweep_burst(base, None),
    }


def _label_shares() -> list[tuple[str, float]]:
    from kubediffusion.simulate.workload import label_mix

    return label_mix(_data()[2])


def _gpus_row(task: Task) -> dict[str, Any]:
    most = 3 * published_setting(task.setting).gpus
    base = scenario(task.setting, task.policy, task.seed, rate=task.load)
    return {"gpus": sweep_gpus(base, most=most), "load": task.load}


def _grid_row(task: Task) -> dict[str, Any]:
    costs, _, _ = _data()
    more: dict[str, Any] = {}
    base = published_setting(task.setting)
    if task.variant == "shiva-0.6":
        denoisers = {each.denoiser: 0.6 for each in base.families.all()}
        return _scaled_rate(task, costs.scaled(denoisers), costs)
    if task.variant == "pinned":
        pinned = costs_of({"models": {}}, {})
        pinned = type(costs)(costs.models, costs.same_host, costs.cross_host, 0.2)
        return _scaled_rate(task, pinned, costs)
    if task.variant == "one-gpu-lost":
        more["options"] = Options(seed=task.seed, faults=(Fault(60.0, 1),))
    elif task.variant == "three-gateways":
        more |= {"gateways": 3, "options": Options(seed=task.seed, report_interval=0.1)}
    elif task.variant == "600s":
        more["repeats"] = 5
    elif task.variant == "noise-0.1":
        more["options"] = Options(seed=task.seed, noise=0.1)
    elif task.variant == "lean":
        more["parameters"] = {"node_bytes": LEAN[task.setting]}
    return _rate_row(task, **more)


# Bytes a node in the lean mode: a cap as a user would write it into a spec.
LEAN = {"S-a": 45e9, "S-b": 30e9, "S-c": 45e9, "S-d": 50e9, "S-e": 50e9, "S-f": 45e9, "S-g": 45e9}


def _scaled_rate(task: Task, costs: Any, solo: Any) -> dict[str, Any]:
    guess = GUESS[task.policy][SETTINGS.index(task.setting)]
    base = replace(scenario(task.setting, task.policy, task.seed), costs=costs, solo_costs=solo)

    def reaches(rate: float) -> bool:
        return simulate(replace(base, rate=rate)).attainment >= SHARE - 1e-9

    overall = largest_rate(reaches, guess)
    return {"overall": overall, "family": ""}


_ROWS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "rates": lambda task: _bound_row(task) if task.policy == "bound" else _rate_row(task),
    "bursts": _burst_row,
    "gpus": _gpus_row,
    "grid": _grid_row,
}


def run_task(task: Task) -> dict[str, Any]:
    begin = time.process_time()
    row = _ROWS[task.table](task)
    head = {
        "setting": task.setting, "policy": task.policy, "seed": task.seed, "variant": task.variant,
    }  # fmt: skip
    row = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
    return head | row | {"cpu_seconds": f"{time.process_time() - begin:.1f}"}


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


def grid(seeds: Sequence[int]) -> Iterator[Task]:
    for variant in (
        "shiva-0.6", "pinned", "one-gpu-lost", "three-gateways", "600s", "noise-0.1",
        "lean",
    ):  # fmt: skip
        for setting in SETTINGS:
            for seed in seeds[: 2 if variant == "600s" else 3]:
                yield Task("grid", setting, "kubediffusion", seed, variant)


def _path(table: str) -> Path:
    return RESULTS / f"{table}.csv"


def read_rows(table: str) -> list[dict[str, str]]:
    if not _path(table).exists():
        return []
    with _path(table).open() as file:
        return list(csv.DictReader(file))


def _append(table: str, row: Mapping[str, Any]) -> None:
    path = _path(table)
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
    order = ["bound", *OURS, *BASELINES, *DIFLOW]
    rows.sort(key=lambda r: (r["setting"], r["variant"], order.index(r["policy"]), int(r["seed"])))
    _path(table).unlink(missing_ok=True)
    for row in rows:
        _append(table, row)


# ------------------------------------------------------------------ tables


def summary_of(table: str, column: str) -> dict[tuple[str, str, str], tuple[float, float, float]]:
    """(setting, policy, variant) -> mean, least, most."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in read_rows(table):
        if row.get(column):
            key = (row["setting"], row["policy"], row["variant"])
            groups.setdefault(key, []).append(float(row[column]))
    return {key: (mean(each), min(each), max(each)) for key, each in groups.items()}


def write_summary() -> None:
    lines = [
        "# Policies on the published settings",
        "",
        "Made by `make paper`; see docs/simulate.md. Rows that are not there yet show as –; "
        "`make paper` goes on from the CSVs.",
        "",
    ]
    for column, title in (
        ("overall", "Largest rate with 90 % of all requests on time: mean (least to most)"),
        ("family", "Largest rate with 90 % of every family by itself"),
    ):
        lines += [f"## {title}", "", *_rates_table(column), ""]
    lines += ["## Ratios", "", *_ratios(), ""]
    for column, title in (
        ("one", "Largest burst of one workflow"),
        ("mixed", "Largest mixed burst"),
    ):
        lines += [f"## {title}", "", *_plain("bursts", column, BURST_SETTINGS), ""]
    lines += [
        "## Fewest GPUs for the load that the best of diffusers, shepherd and clockwork carries",
        "", *_plain("gpus", "gpus", BURST_SETTINGS), "",
        "## Variations of kubediffusion: largest rate, all requests", "", *_grid_table(), "",
    ]  # fmt: skip
    (RESULTS / "summary.md").write_text("\n".join(lines))


def _header(settings: Sequence[str], first: str = "policy") -> list[str]:
    return [f"| {first} | " + " | ".join(settings) + " |", "|---" * (len(settings) + 1) + "|"]


def _rates_table(column: str) -> list[str]:
    values = summary_of("rates", column)
    out = _header(SETTINGS)
    for policy in (*BASELINES, *DIFLOW, *OURS, "bound"):
        out.append(
            f"| {policy} | "
            + " | ".join(_cell(values.get((s, policy, ""))) for s in SETTINGS)
            + " |"
        )
    return out


def _cell(value: tuple[float, float, float] | None) -> str:
    if value is None:
        return "–"
    return f"{value[0]:.2f} ({value[1]:.2f}–{value[2]:.2f})"


def _ratios() -> list[str]:
    overall, family = summary_of("rates", "overall"), summary_of("rates", "family")
    out = _header(SETTINGS, "of the mean rates")

    def value(table: Mapping[Any, Any], setting: str, policy: str) -> float:
        return table.get((setting, policy, ""), (float("nan"),))[0]

    for policy in (*BASELINES, *DIFLOW):
        cells = (
            f"{value(overall, s, 'kubediffusion') / value(overall, s, policy):.2f}"
            if value(overall, s, policy) > 0
            else "–"
            for s in SETTINGS
        )
        out.append(f"| kubediffusion / {policy} | " + " | ".join(cells) + " |")
    # Each policy by what it is for.
    for policy, name, table in zip(
        OURS, ("all requests", "by family"), (overall, family), strict=True
    ):
        cells = (
            f"{100 * value(table, s, policy) / value(table, s, 'bound'):.0f} %" for s in SETTINGS
        )
        out.append(f"| {policy} of the bound, {name} | " + " | ".join(cells) + " |")
    cells = (f"{MARKS[s][1]} ({MARKS[s][2]}) %" for s in SETTINGS)
    out.append("| mark: least (aim) | " + " | ".join(cells) + " |")
    return out


def _plain(table: str, column: str, settings: Sequence[str]) -> list[str]:
    values = summary_of(table, column)
    out = _header(settings)
    for policy in (*BASELINES, *DIFLOW, *OURS):
        if any((s, policy, "") in values for s in settings):
            cells = (
                "–" if (s, policy, "") not in values
                else "{:.1f} ({:.0f}–{:.0f})".format(*values[s, policy, ""])
                for s in settings
            )  # fmt: skip
            out.append(f"| {policy} | " + " | ".join(cells) + " |")
    return out


def _grid_table() -> list[str]:
    values, base = summary_of("grid", "overall"), summary_of("rates", "overall")
    out = _header(SETTINGS, "variation")
    cells = (_cell(base.get((s, "kubediffusion", ""))) for s in SETTINGS)
    out.append("| as above | " + " | ".join(cells) + " |")
    for variant in dict.fromkeys(key[2] for key in values):
        cells = (_cell(values.get((s, "kubediffusion", variant))) for s in SETTINGS)
        out.append(f"| {variant} | " + " | ".join(cells) + " |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="the grid of variations too")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    asked = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if asked.fresh:
        for table in _ROWS:
            _path(table).unlink(missing_ok=True)
    seeds = list(range(asked.seeds))
    random.seed(0)
    quick = ("kubediffusion", "diffusers", "shepherd", "clockwork-aware")
    run_all(headline(seeds, ("bound", *OURS, *BASELINES)), asked.jobs)
    run_all(bursts(seeds, quick), asked.jobs)
    run_all(fleets(seeds, quick), asked.jobs)
    run_all(headline(seeds, DIFLOW), asked.jobs)
    run_all(bursts(seeds[:3], DIFLOW[1:]), asked.jobs)
    run_all(fleets(seeds[:3], DIFLOW[:1]), asked.jobs)
    if asked.full:
        run_all(grid(seeds), asked.jobs)
    write_summary()
    print((RESULTS / "summary.md").read_text())


if __name__ == "__main__":
    main()
