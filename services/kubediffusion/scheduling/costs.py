# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What work costs, from a profile that was measured beforehand.

`profiles` keeps running estimates of a live fleet; this is the table that a planner, a policy or
the simulator reasons with: for each model its load, its size, and its run time by batch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

# The mode of a model that does one thing only.
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Run:
    """One forward of a model at a batch: seconds, and bytes at the peak (weights included)."""

    batch: int
    seconds: float
    peak_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """`load_seconds` is from host memory to the accelerator; `runs` are by mode and batch."""

    load_seconds: float
    nbytes: float
    runs: Mapping[str, tuple[Run, ...]] = field(default_factory=dict[str, tuple[Run, ...]])


@dataclass(frozen=True, slots=True)
class Link:
    """Measured (bytes, seconds) of pulling a tensor, sorted by bytes."""

    points: tuple[tuple[float, float], ...] = ()

    def seconds(self, nbytes: float) -> float:
        """Of the first measured size that is no smaller, or of the largest."""
        if not self.points or nbytes <= 0:
            return 0.0
        at = bisect_left(self.points, (nbytes, 0.0))
        return self.points[min(at, len(self.points) - 1)][1]


class Costs:
    """The tables of a fleet of like accelerators. Nothing in here changes; answers are cached."""

    def __init__(
        self,
        models: Mapping[str, ModelCosts],
        same_host: Link | None = None,
        cross_host: Link | None = None,
        load_scale: float = 1.0,
    ) -> None:
        """`load_scale` multiplies every load: below 1 for weights kept in pinned memory."""
        self.models = models
        self.same_host = same_host or Link()
        self.cross_host = cross_host or Link()
        self.load_scale = load_scale
        self._runs: dict[tuple[str, int, str], float] = {}
        self._transfers: dict[tuple[float, bool], float] = {}

    def run(self, model: str, batch: int = 1, mode: str = DEFAULT) -> float:
        """Seconds of one forward: as measured, interpolated between two measured batches, or
        scaled from the largest. Raises KeyError for a model or mode without a profile."""
        key = (model, batch, mode)
        seconds = self._runs.get(key)
        if seconds is None:
            seconds = self._runs[key] = _interpolated(self.models[model].runs[mode], batch)
        return seconds

    def load(self, model: str) -> float:
        return self.models[model].load_seconds * self.load_scale

    def nbytes(self, models: Iterable[str]) -> float:
        return sum(self.models[model].nbytes for model in models)

    def transfer(self, nbytes: float, same_host: bool) -> float:
        key = (nbytes, same_host)
        seconds = self._transfers.get(key)
        if seconds is None:
            link = self.same_host if same_host else self.cross_host
            if len(self._transfers) > 4096:
                self._transfers.clear()
            seconds = self._transfers[key] = link.seconds(nbytes)
        return seconds

    def scaled(self, factors: Mapping[str, float]) -> Costs:
        """The same fleet where some models take `factors` times as long (a pruning budget)."""
        models = {
            name: ModelCosts(
                costs.load_seconds,
                costs.nbytes,
                {
                    mode: tuple(
                        Run(run.batch, run.seconds * factors.get(name, 1.0), run.peak_bytes)
                        for run in runs
                    )
                    for mode, runs in costs.runs.items()
                },
            )
            for name, costs in self.models.items()
        }
        return Costs(models, self.same_host, self.cross_host, self.load_scale)


def _interpolated(runs: Sequence[Run], batch: int) -> float:
    at = bisect_left([run.batch for run in runs], batch)
    if at == len(runs):
        return runs[-1].seconds * batch / runs[-1].batch
    if at == 0 or runs[at].batch == batch:
        return runs[at].seconds
    low, high = runs[at - 1], runs[at]
    share = (batch - low.batch) / (high.batch - low.batch)
    return low.seconds + share * (high.seconds - low.seconds)
