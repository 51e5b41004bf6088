# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One simulated run, from what is asked to what came out of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.pipelines import Job
from kubediffusion.scheduling.policies.diflow import Tables
from kubediffusion.simulate.autoscale import Autoscaler, Autoscaling
from kubediffusion.simulate.bound import best_attainment
from kubediffusion.simulate.engine import Simulation
from kubediffusion.simulate.fleet import Build, build_fleet
from kubediffusion.simulate.outcome import Options, Outcome
from kubediffusion.simulate.settings import Setting
from kubediffusion.simulate.workload import (
    Arrival,
    Burst,
    Mmpp,
    Trace,
    Wave,
    jobs_of,
    label_mix,
    poisson,
    repeated,
    resampled,
)

Weights = Callable[[float], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A setting under a policy. `rate` is the trace's rate scale (1: as recorded).

    ``arrivals`` is "trace", "poisson", "mmpp" or "wave"; ``burst`` requests come on top.
    """

    setting: Setting
    costs: Costs
    trace: Trace
    policy: str
    rate: float = 1.0
    seed: int = 0
    gpus: int | None = None
    gateways: int = 1
    slo_scale: float | None = None
    arrivals: str = "trace"
    repeats: int = 1
    burst: Burst | None = None
    weights_at: Weights | None = None
    options: Options = field(default_factory=Options)
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tables: Tables = field(default_factory=Tables)
    # What deadlines are reckoned from, where the simulated work is cheaper (a pruning budget).
    solo_costs: Costs | None = None
    # Nodes come and go by demand, within its limits.
    autoscaling: Autoscaling | None = None

    @property
    def nodes(self) -> int:
        if self.autoscaling is not None:
            return self.autoscaling.limits.maximum
        return self.gpus or self.setting.gpus


@dataclass(frozen=True, slots=True)
class Result:
    """`attainment` is the share of all requests that were done by their deadlines."""

    jobs: Sequence[Job]
    outcome: Outcome
    bound: float
    nodes: int

    def on_time(self, job: Job) -> bool:
        finished = self.outcome.finished.get(job.id)
        return finished is not None and finished <= job.deadline + 1e-9

    def share(self, jobs: Sequence[Job]) -> float:
        return sum(self.on_time(job) for job in jobs) / len(jobs) if jobs else 1.0

    @property
    def attainment(self) -> float:
        return self.share(self.jobs)

    def by(self, key: Callable[[Job], str]) -> dict[str, float]:
        groups: dict[str, list[Job]] = {}
        for job in self.jobs:
            groups.setdefault(key(job), []).append(job)
        return {name: self.share(groups[name]) for name in sorted(groups)}

    @property
    def by_family(self) -> dict[str, float]:
        return self.by(lambda job: job.pipeline.family)

    @property
    def by_workflow(self) -> dict[str, float]:
        return self.by(lambda job: job.pipeline.name)

    @property
    def worst_family(self) -> float:
        return min(self.by_family.values(), default=1.0)

    def latencies(self) -> list[float]:
        finished = self.outcome.finished
        return sorted(finished[job.id] - job.arrival for job in self.jobs if job.id in finished)

    def as_dict(self) -> dict[str, object]:
        """What `kubediffusion simulate --json` writes."""
        latencies = self.latencies()
        return {
            "attainment": self.attainment,
            "by_family": self.by_family,
            "by_workflow": self.by_workflow,
            "latency": {
                "mean": sum(latencies) / len(latencies) if latencies else None,
                **{f"p{q}": quantile(latencies, q / 100) for q in (50, 95, 99)},
                "normalized_mean": self._normalized(),
            },
            "gpu_seconds": self.outcome.gpu_seconds,
            "node_seconds": self.outcome.node_seconds,
            "bound": self.bound,
            "requests": len(self.jobs),
            "finished": len(self.outcome.finished),
            "shed": len(self.outcome.shed),
            "gpus": self.nodes,
            "seconds": self.outcome.end,
            "load_seconds": self.outcome.load_seconds,
            "loads": self.outcome.loads,
            "peak_bytes": self.outcome.peak_bytes,
            "lost_steps": self.outcome.lost_steps,
        }

    def _normalized(self) -> float | None:
        finished = self.outcome.finished
        parts = [(finished[j.id] - j.arrival) / j.solo for j in self.jobs if j.id in finished]
        return sum(parts) / len(parts) if parts else None


def quantile(values: Sequence[float], q: float) -> float | None:
    """Of sorted values, by linear interpolation; None of none."""
    if not values:
        return None
    at = q * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low])


def arrivals_of(scenario: Scenario) -> list[Arrival]:
    trace = repeated(scenario.trace, scenario.repeats) if scenario.repeats > 1 else scenario.trace
    mix = label_mix(trace)
    rng = random.Random(scenario.seed)
    mean = scenario.rate * len(trace.arrivals) / trace.seconds
    if scenario.arrivals == "trace":
        out = list(resampled(trace, scenario.rate, scenario.seed).arrivals)
    elif scenario.arrivals == "poisson":
        out = poisson(mean, trace.seconds, mix, rng)
    elif scenario.arrivals == "wave":
        out = Wave().arrivals(mean, trace.seconds, mix, rng)
    else:
        out = Mmpp().arrivals(mean, trace.seconds, mix, rng)
    if scenario.burst is not None:
        out += scenario.burst.arrivals(mix, rng)
    return out


def jobs_for(scenario: Scenario) -> list[Job]:
    return jobs_of(
        arrivals_of(scenario),
        scenario.setting.families,
        scenario.costs,
        scenario.slo_scale or scenario.setting.slo_scale,
        scenario.seed,
        scenario.weights_at,
        scenario.solo_costs,
    )


def planned_mix(scenario: Scenario) -> dict[str, float]:
    """The share of each workflow that planners are told: the families' weights, the trace's
    labels."""
    labels = label_mix(scenario.trace)
    families = scenario.setting.families
    return {
        families.pipelines[family][label].name: weight * share
        for family, weight in families.mix().items()
        for label, share in labels
    }


def simulate(scenario: Scenario, *, jobs: Sequence[Job] | None = None) -> Result:
    jobs = jobs_for(scenario) if jobs is None else jobs
    fleet = build_fleet(
        scenario.policy,
        Build(
            scenario.setting,
            scenario.costs,
            scenario.nodes,
            planned_mix(scenario),
            scenario.gateways,
            scenario.tables,
            scenario.parameters,
            scenario.autoscaling.limits.minimum if scenario.autoscaling else None,
        ),
    )
    scaler = Autoscaler(scenario.autoscaling) if scenario.autoscaling else None
    simulation = Simulation(
        fleet.machines,
        fleet.policies,
        jobs,
        fleet.costs,
        scenario.options,
        gateway_of=(lambda job: job.id % scenario.gateways) if scenario.gateways > 1 else None,
        hooks=[(scenario.autoscaling.interval, scaler)] if scenario.autoscaling and scaler else (),
    )
    outcome = simulation.run()
    outcome.node_seconds = scenario.nodes * outcome.end
    if scaler is not None:
        scaler.finish(simulation)
        outcome.node_seconds = scaler.node_seconds
    return Result(jobs, outcome, bound_of(scenario, jobs), scenario.nodes)


def bound_of(scenario: Scenario, jobs: Sequence[Job]) -> float:
    least = {p.name: p.least_seconds(scenario.costs) for p in scenario.setting.families.all()}
    return best_attainment(jobs, lambda job: least[job.pipeline.name], float(scenario.nodes))
