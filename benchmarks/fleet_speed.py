# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How fast `kubediffusion` decides, in pure Python: python -m benchmarks.fleet_speed [--gpus N].

All twelve workflows at r = 7 G / 32 for a minute. CPU seconds, so that a busy machine measures
alike: placements a second of a policy's own time, the 99th percentile of a decision round, and how
much faster than real time the simulator is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.fleet_rows import Task, scenario
from kubediffusion.scheduling.policies.kubediffusion import KubeDiffusion
from kubediffusion.scheduling.policy import Action, Start
from kubediffusion.simulate.scenario import quantile, simulate

SECONDS = 60.0


def measure(gpus: int, policy: str = "kubediffusion", rate_share: float = 7.0) -> dict[str, float]:
    rounds: list[float] = []
    spent = [0.0]
    placements = [0]
    clock = time.thread_time
    kept = {name: getattr(KubeDiffusion, name) for name in ("decide", "arrived", "ended")}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: KubeDiffusion, *arguments: Any) -> Any:
            begin = clock()
            out = function(self, *arguments)
            seconds = clock() - begin
            spent[0] += seconds
            if name == "decide":
                rounds.append(seconds)
                actions: Sequence[Action] = out
                placements[0] += sum(isinstance(action, Start) for action in actions)
            return out

        return call

    base = scenario(Task("", "S-e", policy, 1), gpus=gpus, rate=rate_share * gpus / 32)
    half = replace(
        base.trace,
        arrivals=tuple(each for each in base.trace.arrivals if each.time <= SECONDS),
        seconds=SECONDS,
    )
    for name, function in kept.items():
        setattr(KubeDiffusion, name, timed(name, function))
    begin = clock()
    try:
        result = simulate(replace(base, trace=half))
    finally:
        for name, function in kept.items():
            setattr(KubeDiffusion, name, function)
    total = clock() - begin
    rounds.sort()
    return {
        "gpus": gpus,
        "requests": len(result.jobs),
        "attainment": result.attainment,
        "placements a second": placements[0] / max(spent[0], 1e-9),
        "mean round ms": 1000 * sum(rounds) / len(rounds),
        "p99 round ms": 1000 * (quantile(rounds, 0.99) or 0.0),
        "times real time": result.outcome.end / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="*", default=[8, 32, 128, 256])
    for gpus in parser.parse_args().gpus:
        print(", ".join(f"{k} {v:.4g}" for k, v in measure(gpus).items()), flush=True)


if __name__ == "__main__":
    main()
