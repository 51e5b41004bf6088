# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The rows of the tables of scheduling: what is simulated for each, and how it is searched."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from kubediffusion.cli.simulate import published_data, read_json
from kubediffusion.scaling import Limits
from kubediffusion.scheduling.costs import Costs, Link
from kubediffusion.scheduling.policies.diflow import Tables
from kubediffusion.simulate.autoscale import Autoscaling
from kubediffusion.simulate.bound import best_attainment, reaches_by_family
from kubediffusion.simulate.outcome import Fault, Options
from kubediffusion.simulate.scenario import Result, Scenario, jobs_for, simulate
from kubediffusion.simulate.settings import SETTINGS, costs_of, published_setting, tables_of
from kubediffusion.simulate.sweep import largest_rate, sweep_burst, sweep_gpus
from kubediffusion.simulate.workload import Trace, Wave, label_mix, parse_trace

RESULTS = Path(__file__).parent / "results" / "fleet"
SHARE = 0.9
BASELINES = ("diffusers", "shepherd", "clockwork", "clockwork-aware")
OURS = ("kubediffusion", "kubediffusion-fair")
DEDICATED = "dedicated"
DIFLOW = ("diflow", "diflow-no-abort")
BURST_SETTINGS = ("S-a", "S-b", "S-c", "S-d", "S-e")
# Where the searches begin; they may end anywhere.
GUESS = {
    "kubediffusion": (5.4, 4.8, 5.0, 3.4, 7.0, 1.55, 1.22),
    "kubediffusion-fair": (5.4, 4.8, 4.7, 2.8, 6.0, 1.55, 1.22),
    "diffusers": (3.3, 3.1, 2.0, 0.5, 2.1, 1.0, 0.85),
    "shepherd": (3.3, 3.1, 3.2, 1.3, 3.1, 1.0, 0.95),
    "clockwork": (0.1, 0.8, 0.3, 0.1, 0.1, 0.8, 0.85),
    "dedicated": (1.5, 1.2, 1.0, 0.3, 1.5, 0.4, 0.4),
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


@lru_cache(maxsize=1)
def published() -> tuple[Costs, Tables, Trace]:
    """Profiles, DiFlow's tables, and the trace of 120 s."""
    folder = published_data()
    costs = costs_of(
        read_json(folder / "model_profiles.json"), read_json(folder / "transfer_profiles.json")
    )
    tables = tables_of(read_json(folder / "scheduler_tables.json"))
    return costs, tables, parse_trace((folder / "trace_rs1.0_t120.txt").read_text())


def scenario(task: Task, **more: Any) -> Scenario:
    costs, tables, trace = published()
    given = {"costs": costs, "options": Options(seed=task.seed), **more}
    return Scenario(
        published_setting(task.setting), trace=trace, policy=task.policy,
        seed=task.seed, tables=tables, **given,
    )  # fmt: skip


def _rate_row(task: Task, **more: Any) -> dict[str, Any]:
    """The largest rates at which all requests, and every family by itself, are 90 % on time."""
    seen: dict[float, Result] = {}

    def result(rate: float) -> Result:
        if rate not in seen:
            base = scenario(task, **more)
            seen[rate] = simulate(replace(base, rate=rate))
        return seen[rate]

    guess = GUESS[task.policy][SETTINGS.index(task.setting)]
    overall = largest_rate(lambda rate: result(rate).attainment >= SHARE - 1e-9, guess)
    family = overall
    if len(published_setting(task.setting).families.pipelines) > 1:
        family = largest_rate(lambda rate: result(rate).worst_family >= SHARE - 1e-9, guess)
    return {"overall": overall, "family": family}


def _bound_row(task: Task) -> dict[str, Any]:
    costs, _, _ = published()
    base = scenario(replace(task, policy="diffusers"))
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
    costs, _, trace = published()
    base = scenario(task, arrivals="poisson")
    mix = base.setting.families.mix()
    labels = dict(label_mix(trace))
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


def _gpus_row(task: Task) -> dict[str, Any]:
    most = 3 * published_setting(task.setting).gpus
    base = scenario(task, rate=task.load)
    return {"gpus": sweep_gpus(base, most=most), "load": task.load}


# Bytes a node in the lean mode: a cap as a user would write it into a spec.
LEAN = {"S-a": 33e9, "S-b": 20e9, "S-c": 45e9, "S-d": 50e9, "S-e": 50e9, "S-f": 45e9, "S-g": 33e9}
# The most of a day's load, as a share of the largest rate that the whole fleet serves.
PEAK = 0.9
# Loads from pinned memory take so much of what others take; a Shiva budget's denoiser steps too.
PINNED, SHIVA = 0.2, 0.6


def _changed(task: Task) -> dict[str, Any]:
    """What a variation changes of the scenario."""
    costs, _, _ = published()
    families = published_setting(task.setting).families
    changes: dict[str, Callable[[], dict[str, Any]]] = {
        "shiva-0.6": lambda: {
            "costs": costs.scaled({each.denoiser: SHIVA for each in families.all()}),
            "solo_costs": costs,
        },
        "pinned": lambda: {"costs": Costs(costs.models, costs.same_host, costs.cross_host, PINNED)},
        "grpc": lambda: {"costs": Costs(costs.models, *measured_links())},
        "one-gpu-lost": lambda: {"options": Options(seed=task.seed, faults=(Fault(60.0, 1),))},
        "three-gateways": lambda: {
            "gateways": 3,
            "options": Options(seed=task.seed, report_interval=0.1),
        },
        "600s": lambda: {"repeats": 5},
        "noise-0.1": lambda: {"options": Options(seed=task.seed, noise=0.1)},
        "lean": lambda: {"parameters": {"node_bytes": LEAN[task.setting]}},
    }
    return changes[task.variant]() if task.variant in changes else {}


def _grid_row(task: Task) -> dict[str, Any]:
    """The rates, and what models take of a GPU at the largest of them."""
    changed = _changed(task)
    row = _rate_row(task, **changed)
    held = simulate(scenario(task, rate=row["overall"], **changed))
    return row | {"gigabytes": held.outcome.peak_bytes / held.nodes / 1e9}


def _autoscale_row(task: Task) -> dict[str, Any]:
    """An hour in which the load goes up and down once, to what the whole fleet just serves; a node
    serves `variant` seconds after it was asked for, or is always there."""
    most = published_setting(task.setting).gpus
    rate = GUESS[task.policy][SETTINGS.index(task.setting)] * PEAK / (1.0 + Wave().depth)
    more: dict[str, Any] = {}
    if task.variant != "always":
        limits = Limits(max(2, most // 4), most, target=1.0)
        more["autoscaling"] = Autoscaling(limits, startup=float(task.variant))
    result = simulate(scenario(task, rate=rate, repeats=30, arrivals="wave", **more))
    outcome = result.outcome
    return {
        "attainment": result.attainment,
        "worst_family": result.worst_family,
        "nodes": outcome.node_seconds / outcome.end,
    }


# Four times one family, at rates that a plan for that mix serves.
SHIFTED = {"schnell": 5.0, "sd3": 5.0, "sd35": 3.2, "dev": 2.0}
SHIFT_AT, SETTLED = 120.0, 180.0


def _shift_row(task: Task) -> dict[str, Any]:
    """The mix shifts to four times the family `variant` and nobody says so: what is on time of the
    requests that come a minute later and on, beside a plan for that mix and one that stays."""
    families = published_setting(task.setting).families
    then = {name: 4.0 if name == task.variant else 1.0 for name in families.pipelines}
    base = scenario(task, rate=SHIFTED[task.variant], repeats=3)

    def weights_at(at: float) -> Mapping[str, float]:
        return then if at >= SHIFT_AT else families.weights

    def share(each: Scenario) -> float:
        result = simulate(each)
        return result.share([job for job in result.jobs if job.arrival >= SETTLED])

    shifting = replace(base, weights_at=weights_at)
    still = replace(shifting, parameters={"follow": False})
    told = replace(still, setting=replace(base.setting, families=replace(families, weights=then)))
    return {"follows": share(shifting), "told": share(told), "stays": share(still)}


def measured_links() -> tuple[Link, Link]:
    """Pulling tensors as this repository measured it (results/tensors.csv): by shared memory on a
    host, by gRPC between hosts; what a small one adds to a call is paid by all."""
    with (RESULTS.parent / "tensors.csv").open() as file:
        reached = {row["name"]: float(row["ours"]) for row in csv.DictReader(file)}
    small = reached["a 60 KiB tensor adds to a call"] / 1e3
    speeds = (
        reached["64 MiB shared memory, put, get and copy out, beside memcpy"] * 1e9,
        reached["64 MiB gRPC, beside a TCP socket"] * 1e9,
    )
    sizes = [2.0**power for power in range(12, 31)]
    same, cross = (
        Link(tuple((nbytes, small + nbytes / speed) for nbytes in sizes)) for speed in speeds
    )
    return same, cross


ROWS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "rates": lambda task: _bound_row(task) if task.policy == "bound" else _rate_row(task),
    "bursts": _burst_row,
    "gpus": _gpus_row,
    "grid": _grid_row,
    "autoscale": _autoscale_row,
    "shift": _shift_row,
}


def run_task(task: Task) -> dict[str, Any]:
    begin = time.process_time()
    row = ROWS[task.table](task)
    head = {
        "setting": task.setting, "policy": task.policy, "seed": task.seed, "variant": task.variant,
    }  # fmt: skip
    row = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
    return head | row | {"cpu_seconds": f"{time.process_time() - begin:.1f}"}
