# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Measured costs: how long a stage runs, a model loads, and a byte travels.

An estimate is the median of the last measurements, which a first slow run (lazy initialisation, a
cold cache) or one disturbed run does not move. Run times are kept by amount of work, since time is
not quite proportional to it; an amount never seen is scaled from those that were.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

WINDOW = 11
AMOUNTS = 16


@dataclass(frozen=True, slots=True)
class CostDefaults:
    """Assumed before the first measurement. Seconds, and bytes a second."""

    run_seconds: float = 0.05
    load_seconds: float = 10.0
    same_host_bytes_per_second: float = 2e9
    other_host_bytes_per_second: float = 2e8


class _Window:
    """The last measurements of one thing and their median."""

    __slots__ = ("_median", "values")

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=WINDOW)
        self._median: float | None = None

    def add(self, value: float) -> None:
        self.values.append(value)
        self._median = None

    @property
    def median(self) -> float:
        if self._median is None:
            ordered = sorted(self.values)
            middle = len(ordered) // 2
            self._median = (
                ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
            )
        return self._median


class _StageProfile:
    """Run times of one stage of one model on one kind of device, by amount of work."""

    __slots__ = ("by_units", "rate")

    def __init__(self) -> None:
        self.by_units: dict[float, _Window] = {}
        self.rate = _Window()

    def add(self, units: float, seconds: float) -> None:
        window = self.by_units.pop(units, None) or _Window()
        window.add(seconds)
        self.by_units[units] = window  # the most recently seen amount is last
        if len(self.by_units) > AMOUNTS:
            del self.by_units[next(iter(self.by_units))]
        self.rate.add(seconds / units)

    def estimate(self, units: float) -> float:
        window = self.by_units.get(units)
        return window.median if window is not None else self.rate.median * units


class Profiles:
    """The running estimates of one coordinator. Holds no clock: measurements are handed in."""

    def __init__(self, defaults: CostDefaults | None = None) -> None:
        self.defaults = defaults or CostDefaults()
        self._runs: dict[tuple[str, str, str], _StageProfile] = {}
        self._loads: dict[str, _Window] = {}
        self._rates: dict[bool, _Window] = {}
        # Of an earlier measurement: what holds until there is one of our own.
        self._before: dict[tuple[str, str, str], _StageProfile] = {}

    def begin_with(self, stages: Iterable[Mapping[str, Any]]) -> None:
        """`stages` of a `model_profiles.json`, as `kubediffusion profile` writes it: times to start
        from, of devices of that fingerprint and, failing others, of all. Raises KeyError, TypeError
        or ValueError for what is no such list."""
        for row in stages:
            model, stage = str(row["model"]), str(row["stage"])
            units, seconds = float(row["units"]), float(row["seconds"])
            if not (units > 0.0 and math.isfinite(seconds) and seconds >= 0.0):
                raise ValueError(f"{units:g} units of {stage} in {seconds:g} s")
            for kind in {str(row["fingerprint"]), ""}:
                known = self._before.setdefault((model, stage, kind), _StageProfile())
                known.add(units, seconds)

    def observe_run(
        self, model: str, stage: str, fingerprint: str, units: float, seconds: float
    ) -> None:
        """`units` of work (such as steps x pixels) of a stage took `seconds`."""
        if not (math.isfinite(seconds) and seconds >= 0.0 and units > 0.0):
            return
        for kind in (fingerprint, ""):
            profile = self._runs.get((model, stage, kind))
            if profile is None:
                profile = self._runs[model, stage, kind] = _StageProfile()
            profile.add(units, seconds)
            if not fingerprint:
                break

    def run_seconds(self, model: str, stage: str, fingerprint: str, units: float) -> float:
        """Expected run time: of this kind of device, else of any, else the default."""
        measured = self.measured_run(model, stage, fingerprint, units)
        return self.defaults.run_seconds if measured is None else measured

    def measured_run(self, model: str, stage: str, fingerprint: str, units: float) -> float | None:
        """As `run_seconds`; None before the first measurement anywhere."""
        own, any_kind = (model, stage, fingerprint), (model, stage, "")
        profile = (
            self._runs.get(own)
            or self._before.get(own)
            or self._runs.get(any_kind)
            or self._before.get(any_kind)
        )
        return None if profile is None else profile.estimate(max(units, 1e-12))

    def observe_load(self, model: str, seconds: float) -> None:
        if math.isfinite(seconds) and seconds > 0.0:
            self._loads.setdefault(model, _Window()).add(seconds)

    def load_seconds(self, model: str) -> float:
        window = self._loads.get(model)
        return self.defaults.load_seconds if window is None else window.median

    def observe_transfer(self, same_host: bool, nbytes: int, seconds: float) -> None:
        if nbytes > 0 and math.isfinite(seconds) and seconds > 0.0:
            self._rates.setdefault(same_host, _Window()).add(nbytes / seconds)

    def transfer_seconds(self, same_host: bool, nbytes: int) -> float:
        if not nbytes:
            return 0.0
        window = self._rates.get(same_host)
        if window is not None:
            return nbytes / window.median
        defaults = self.defaults
        return nbytes / (
            defaults.same_host_bytes_per_second
            if same_host
            else defaults.other_host_bytes_per_second
        )

    def forget_models(self, keep: frozenset[str]) -> None:
        """Drop what is known of models that no workflow uses any more."""
        self._runs = {key: value for key, value in self._runs.items() if key[0] in keep}
        self._loads = {key: value for key, value in self._loads.items() if key in keep}
