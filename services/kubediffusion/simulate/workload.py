# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Requests over time: traces replayed at a rate, and synthetic arrivals.

A trace is a line a request: a workflow label and the seconds since the previous arrival. At rate
scale r its sequence is repeated ceil(r) times, int(r n) of it are drawn in order, and the whole is
compressed into the trace's own length; for seeds other than `PUBLISHED_SEED` the sequence is also
rotated by a seeded offset, so that each seed is another trace of the same source.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kubediffusion.errors import InvalidInput
from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.pipelines import Job, Pipeline

PUBLISHED_SEED = 666


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the label'th workflow of its family (A: 0, B: 1, C: 2)."""

    time: float
    label: str
    # None: drawn.
    family: str | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrivals of `seconds`; sorted by time."""

    arrivals: tuple[Arrival, ...]
    seconds: float

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({each.label for each in self.arrivals}))


def parse_trace(text: str, where: str = "the trace") -> Trace:
    """Lines of `LABEL GAP`. Raises InvalidInput with the line that is wrong."""
    arrivals: list[Arrival] = []
    now = 0.0
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields or line.startswith("#"):
            continue
        try:
            label, gap = fields[0], float(fields[1])
        except (IndexError, ValueError):
            gap, label = -1.0, ""
        if len(fields) != 2 or not (math.isfinite(gap) and gap >= 0.0):
            raise InvalidInput(
                f"{where}, line {number}: '{line[:60]}' is not 'LABEL SECONDS', a workflow label "
                "and the gap to the previous arrival"
            )
        now += gap
        arrivals.append(Arrival(now, label))
    if not arrivals:
        raise InvalidInput(f"{where} has no arrivals: write one 'LABEL SECONDS' a line")
    return Trace(tuple(arrivals), now)


def resampled(trace: Trace, rate: float, seed: int) -> Trace:
    """The trace at `rate` times its own rate, as another draw from the same source."""
    rng = random.Random(seed * 1_000_003 + round(rate * 1e6))
    base = trace.arrivals
    if seed != PUBLISHED_SEED:
        base = _rotated(trace, random.Random(seed).randrange(len(base)))
    copies = math.ceil(rate)
    count = int(rate * len(base))
    chosen = sorted(rng.sample(range(copies * len(base)), count)) if count else []
    out: list[Arrival] = []
    for at in chosen:
        copy, index = divmod(at, len(base))
        each = base[index]
        out.append(Arrival((copy * trace.seconds + each.time) / copies, each.label))
    return Trace(tuple(out), trace.seconds)


def _rotated(trace: Trace, offset: int) -> tuple[Arrival, ...]:
    """The sequence begun at its offset'th gap, with the rest behind it."""
    times = [0.0, *(each.time for each in trace.arrivals)]
    gaps = [(b - a, e.label) for a, b, e in zip(times, times[1:], trace.arrivals, strict=False)]
    now, out = 0.0, list[Arrival]()
    for gap, label in gaps[offset:] + gaps[:offset]:
        now += gap
        out.append(Arrival(now, label))
    return tuple(out)


def repeated(trace: Trace, times: int) -> Trace:
    """`times` traces one after the other."""
    out = [
        Arrival(copy * trace.seconds + each.time, each.label)
        for copy in range(times)
        for each in trace.arrivals
    ]
    return Trace(tuple(out), trace.seconds * times)


Mix = Sequence[tuple[str, float]]


def poisson(rate: float, seconds: float, mix: Mix, rng: random.Random) -> list[Arrival]:
    """`rate` requests a second with exponential gaps, labels drawn from `mix`."""
    labels, weights = [label for label, _ in mix], [weight for _, weight in mix]
    out: list[Arrival] = []
    now = rng.expovariate(rate) if rate > 0 else seconds
    while now < seconds:
        out.append(Arrival(now, rng.choices(labels, weights)[0]))
        now += rng.expovariate(rate)
    return out


@dataclass(frozen=True, slots=True)
class Mmpp:
    """A Markov-modulated Poisson process: `high` times the mean rate in bursts of `burst_seconds`
    on average, and as much less in between that the mean is kept."""

    high: float = 3.0
    burst_seconds: float = 5.0
    share: float = 0.2

    def arrivals(self, rate: float, seconds: float, mix: Mix, rng: random.Random) -> list[Arrival]:
        low = max(0.0, (1.0 - self.share * self.high) / (1.0 - self.share))
        calm = self.burst_seconds * (1.0 - self.share) / self.share
        out: list[Arrival] = []
        now, bursting = 0.0, rng.random() < self.share
        while now < seconds:
            length = rng.expovariate(1.0 / (self.burst_seconds if bursting else calm))
            length = min(length, seconds - now)
            piece = poisson(rate * (self.high if bursting else low), length, mix, rng)
            out += [Arrival(now + each.time, each.label) for each in piece]
            now, bursting = now + length, not bursting
        return out


@dataclass(frozen=True, slots=True)
class Wave:
    """A day: a Poisson process whose rate goes up and down once, from the least to the most and
    back: the mean times 1 - depth cos(2 pi t / seconds)."""

    depth: float = 0.7

    def arrivals(self, rate: float, seconds: float, mix: Mix, rng: random.Random) -> list[Arrival]:
        most = 1.0 + self.depth
        return [
            each
            for each in poisson(rate * most, seconds, mix, rng)
            if rng.random() * most
            < 1.0 - self.depth * math.cos(2.0 * math.pi * each.time / seconds)
        ]


@dataclass(frozen=True, slots=True)
class Burst:
    """`size` requests spread over `spread` seconds from `at` on; None: labels as in the mix."""

    size: int
    at: float = 20.0
    spread: float = 1.0
    label: str | None = None
    family: str | None = None

    def arrivals(self, mix: Mix, rng: random.Random) -> list[Arrival]:
        labels, weights = [label for label, _ in mix], [weight for _, weight in mix]
        return [
            Arrival(
                self.at + self.spread * i / self.size,
                self.label or rng.choices(labels, weights)[0],
                self.family,
            )
            for i in range(self.size)
        ]


def label_mix(trace: Trace) -> list[tuple[str, float]]:
    """The labels with their share of the trace."""
    total = len(trace.arrivals)
    return [
        (label, sum(each.label == label for each in trace.arrivals) / total)
        for label in trace.labels
    ]


@dataclass(frozen=True, slots=True)
class Families:
    """Which workflow an arrival means: its family is drawn, its label names the one within it."""

    pipelines: Mapping[str, Mapping[str, Pipeline]]
    weights: Mapping[str, float]

    def all(self) -> list[Pipeline]:
        return [each for family in self.pipelines.values() for each in family.values()]

    def mix(self) -> dict[str, float]:
        total = sum(self.weights.values())
        return {family: weight / total for family, weight in self.weights.items()}


def jobs_of(
    arrivals: Sequence[Arrival],
    families: Families,
    costs: Costs,
    slo_scale: float,
    seed: int,
    weights_at: Callable[[float], Mapping[str, float]] | None = None,
    solo_costs: Costs | None = None,
) -> list[Job]:
    """Requests with deadlines of `slo_scale` times their solo time, in the order of arrival.

    `weights_at(t)` replaces the families' weights at a time, for a mix that shifts; solo times are
    those of `solo_costs` where the deadline shall stay while the work shrinks (a pruning budget).
    """
    rng = random.Random(seed * 7_919 + 17)
    names = list(families.pipelines)
    solo = {p.name: p.solo_seconds(solo_costs or costs) for p in families.all()}
    jobs: list[Job] = []
    for arrival in sorted(arrivals, key=lambda each: each.time):
        weights = weights_at(arrival.time) if weights_at else families.weights
        drawn = rng.choices(names, [weights.get(name, 0.0) for name in names])[0]
        family = arrival.family or drawn
        pipeline = _of(families.pipelines[family], arrival.label, family)
        alone = solo[pipeline.name]
        deadline = arrival.time + slo_scale * alone
        jobs.append(Job(len(jobs), pipeline, arrival.time, deadline, alone))
    return jobs


def _of(pipelines: Mapping[str, Pipeline], label: str, family: str) -> Pipeline:
    if label in pipelines:
        return pipelines[label]
    raise InvalidInput(
        f"the trace asks for workflow '{label}' of family '{family}', which has "
        f"{', '.join(pipelines)}: name the workflows by the labels of the trace"
    )
