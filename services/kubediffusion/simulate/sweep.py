# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The largest rate or burst, or the smallest fleet, that still holds a share of the deadlines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kubediffusion.simulate.scenario import Result, Scenario, simulate
from kubediffusion.simulate.workload import Burst

Judge = Callable[[Result], float]


def overall(result: Result) -> float:
    return result.attainment


def every_family(result: Result) -> float:
    return result.worst_family


def largest_rate(
    reaches: Callable[[float], bool], guess: float, tolerance: float = 0.01, most: float = 64.0
) -> float:
    """The largest rate that `reaches`, to `tolerance` of itself: doubled from `guess`, bisected.

    What is reached is not quite monotone, as each rate is another draw of the trace; the search
    takes the same way for everybody.
    """
    low, high = 0.0, guess
    while high < most and reaches(high):
        low, high = high, high * 1.25
    while high - low > tolerance * max(high, 0.2):
        middle = (low + high) / 2
        if reaches(middle):
            low = middle
        else:
            high = middle
    return low


def sweep_rate(
    scenario: Scenario,
    judge: Judge = overall,
    share: float = 0.9,
    guess: float = 2.0,
    tolerance: float = 0.01,
) -> float:
    def reaches(rate: float) -> bool:
        return judge(simulate(replace(scenario, rate=rate))) >= share - 1e-9

    return largest_rate(reaches, guess, tolerance)


def sweep_burst(
    scenario: Scenario,
    label: str | None,
    share: float = 0.9,
    most: int = 256,
    family: str | None = None,
) -> int:
    """The largest burst of which `share` is on time, and of the other requests as well; all of
    workflow `label` of `family` where these are given."""

    def reaches(size: int) -> bool:
        if size == 0:
            return True
        burst = Burst(size, label=label, family=family)
        result = simulate(replace(scenario, burst=burst))
        inside = [job for job in result.jobs if job.id in burst_ids(result, burst)]
        ids = {job.id for job in inside}
        base = [job for job in result.jobs if job.id not in ids]
        return min(result.share(inside), result.share(base)) >= share - 1e-9

    low, high = 0, 4
    while high <= most and reaches(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reaches(middle) else (low, middle)
    return low


def burst_ids(result: Result, burst: Burst) -> set[int]:
    times = {round(burst.at + burst.spread * i / burst.size, 9) for i in range(burst.size)}
    return {job.id for job in result.jobs if round(job.arrival, 9) in times}


def sweep_gpus(
    scenario: Scenario, judge: Judge = overall, share: float = 0.9, most: int = 96
) -> int:
    """The fewest GPUs; `most` + 1 where none suffice."""

    def reaches(gpus: int) -> bool:
        return judge(simulate(replace(scenario, gpus=gpus))) >= share - 1e-9

    low, high = 0, most
    if not reaches(most):
        return most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if reaches(middle):
            high = middle
        else:
            low = middle
    return high
