# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Small instances: how many requests each policy has on time, and how many could be.

`python -m benchmarks.fleet --optimum` writes results/fleet/optimum.csv. What is left out of the
optimum's model (simulate/optimum.py) is left out of the simulated fleet too: a batch of n takes n
times as long, transfers, overheads and samplers take nothing, and every GPU has room for all
models. So no policy can do better than the optimum, and what is missing is what its choices cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.fleet_rows import BASELINES, DIFLOW, OURS, published
from kubediffusion.scheduling.costs import Costs, ModelCosts, Run
from kubediffusion.scheduling.pipelines import Job
from kubediffusion.simulate.optimum import Demand, most_on_time
from kubediffusion.simulate.scenario import Scenario, jobs_for, simulate
from kubediffusion.simulate.settings import Setting, published_setting

POLICIES = (*BASELINES, *DIFLOW, *OURS)
REQUESTS = 12
# Times what the GPUs can do, once all have arrived: there is something to choose.
LOADS = (1.0, 2.0, 4.0)
SETTINGS = ("S-a", "S-b", "S-c", "S-d", "S-f", "S-g")
ROOM = 1e12


def linear(costs: Costs, models: Sequence[str]) -> Costs:
    """The same models where batching gains nothing and tensors are everywhere at once."""
    table: dict[str, ModelCosts] = {}
    for name in models:
        entry = costs.models[name]
        runs = {
            mode: tuple(Run(batch, batch * each[0].seconds) for batch in (1, 2, 4, 8))
            for mode, each in entry.runs.items()
        }
        table[name] = ModelCosts(entry.load_seconds, entry.nbytes, runs)
    return Costs(table)


@dataclass(frozen=True)
class Instance:
    setting: str
    gpus: int
    load: float
    seed: int

    def scenario(self, policy: str) -> Scenario:
        costs, tables, trace = published()
        base = published_setting(self.setting)
        models = sorted({m for each in base.families.all() for m in _models(each, costs)})
        flat = linear(costs, models)
        free = {} if policy not in OURS else {"dispatch": 0.0, "sampler": 0.0}
        return Scenario(
            _roomy(base), flat, trace, policy, seed=self.seed, gpus=self.gpus,
            tables=replace(tables, dispatch=0.0, sampler=0.0), parameters=free,
        )  # fmt: skip

    def jobs(self) -> list[Job]:
        """The first requests of a Poisson process that asks for `load` times the GPUs."""
        base = self.scenario("kubediffusion")
        mean = sum(
            base.setting.families.mix()[each.family] * each.solo_seconds(base.costs) / 3
            for each in base.setting.families.all()
        )
        own = len(base.trace.arrivals) / base.trace.seconds
        rate = self.load * self.gpus / mean / own
        asked = jobs_for(replace(base, rate=rate, arrivals="poisson", repeats=8))
        return asked[:REQUESTS]


def _models(pipeline: Any, costs: Costs) -> list[str]:
    named = (*pipeline.models, pipeline.sampler, pipeline.latents)
    return [each for each in named if each in costs.models]


def _roomy(setting: Setting) -> Setting:
    return replace(setting, node_bytes=ROOM, monolith_bytes=ROOM, pipeline_bytes={})


def optimum_of(jobs: Sequence[Job], gpus: int) -> int:
    return most_on_time([demand_of(job) for job in jobs], gpus)


def demand_of(job: Job) -> Demand:
    """Branches of guidance are side by side, and each ControlNet beside its denoiser."""
    pipeline = job.pipeline
    width = pipeline.branches * (1 + len(pipeline.controls))
    return Demand(job.arrival, job.deadline, job.solo, width)


def rows(seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    for setting in SETTINGS:
        for gpus in (1, 2, 3):
            for load in LOADS:
                for seed in seeds:
                    instance = Instance(setting, gpus, load, seed)
                    jobs = instance.jobs()
                    row: dict[str, Any] = {
                        "setting": setting, "gpus": gpus, "load": load, "seed": seed,
                        "requests": len(jobs), "optimum": optimum_of(jobs, gpus),
                    }  # fmt: skip
                    for policy in POLICIES:
                        result = simulate(instance.scenario(policy), jobs=jobs)
                        row[policy] = sum(result.on_time(job) for job in jobs)
                    yield row


def table(rows: Sequence[dict[str, str]]) -> list[str]:
    """By load: the mean share of the optimum, and of how many instances it was reached."""
    loads = sorted({float(row["load"]) for row in rows})
    out = [
        "| policy | " + " | ".join(f"load {load:g}" for load in loads) + " |",
        "|---" * (len(loads) + 1) + "|",
    ]
    for policy in POLICIES:
        cells: list[str] = []
        for load in loads:
            some = [row for row in rows if float(row["load"]) == load]
            got = sum(int(row[policy]) for row in some)
            best = sum(int(row["optimum"]) for row in some)
            equal = sum(row[policy] == row["optimum"] for row in some)
            cells.append(f"{100 * got / best:.0f} % ({100 * equal / len(some):.0f} %)")
        out.append(f"| {policy} | " + " | ".join(cells) + " |")
    return out
