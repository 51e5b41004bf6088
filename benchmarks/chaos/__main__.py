# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.chaos: a run, its table, and a row in benchmarks/results/chaos.csv."""

from __future__ import annotations

import argparse
import asyncio
import csv
import datetime
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.chaos.faults import Chaos, schedule
from benchmarks.chaos.fleet import LEASE, Fleet, workflow_of
from benchmarks.chaos.load import Load, Tally
from benchmarks.common import RESULTS, machine

STEPS = {"standin": 12, "tiny-sd3": 28}


@dataclass(frozen=True)
class Asked:
    """`gap`: seconds between two faults, on average; `deadline`: of each request, in seconds."""

    model: str = "standin"
    requests: int = 10_000
    seconds: float = 600.0
    seed: int = 1
    gap: float = 3.0
    step_seconds: float = 0.003
    deadline: float = 120.0
    pictures: int = 40


@dataclass(frozen=True)
class Outcome:
    tally: Tally
    faults: dict[str, int]
    seconds: float
    left: int

    @property
    def good(self) -> bool:
        return not self.tally.wrong and not self.left


async def chaos(asked: Asked, progress: Progress | None = None) -> Outcome:
    """Everything from the first process to the last. Raises nothing of what it looks for."""
    workflow = workflow_of(asked.model, asked.step_seconds)
    inputs = {"prompt": "a red circle above a blue square", "steps": STEPS[asked.model]}
    bar = progress.add_task("undisturbed", total=asked.requests) if progress else None

    def advance() -> None:
        if progress is not None and bar is not None:
            progress.advance(bar)

    with tempfile.TemporaryDirectory(prefix="kd-") as folder:
        async with Fleet(workflow, Path(folder)) as fleet:
            load = Load(workflow.name, inputs, fleet.doors, asked.deadline)
            try:
                await load.undisturbed(asked.pictures)
                if progress is not None and bar is not None:
                    progress.update(bar, description="with faults")
                start = time.monotonic()
                faults = schedule(asked.seconds, len(fleet.nodes), asked.gap, asked.seed)
                trouble = Chaos(fleet, faults, [asked.seconds * 0.3, asked.seconds * 0.6])
                async with asyncio.TaskGroup() as group:
                    group.create_task(trouble.run())
                    group.create_task(load.run(asked.requests, asked.seconds, asked.seed, advance))
                seconds = time.monotonic() - start
                left = await _left(load, fleet)
            finally:
                await load.close()
    return Outcome(load.tally, dict(trouble.happened), seconds, left)


async def _left(load: Load, fleet: Fleet) -> int:
    """What a dead gateway left on the nodes goes with its lease."""
    addresses = [node.relay.address for node in fleet.nodes]
    ends = time.monotonic() + LEASE + 5
    left = await load.left_on(addresses)
    while left and time.monotonic() < ends:
        await asyncio.sleep(0.5)
        left = await load.left_on(addresses)
    return left


def _write(asked: Asked, outcome: Outcome) -> None:
    tally = outcome.tally
    row = {
        "day": datetime.date.today().isoformat(),
        "machine": machine(),
        "model": asked.model,
        "seed": asked.seed,
        "seconds": round(outcome.seconds),
        "requests": asked.requests,
        "streams": tally.streams,
        "jobs": tally.jobs,
        "faults": " ".join(f"{k}={n}" for k, n in sorted(outcome.faults.items())),
        "resumed": tally.resumed,
        "sent again": tally.sent_again,
        "median s": round(tally.median, 3),
        "p99 s": round(tally.percentile(0.99), 2),
        "slowest s": round(max(tally.seconds, default=0.0), 2),
        "wrong": len(tally.wrong),
        "tensors left": outcome.left,
    }
    path = RESULTS / "chaos.csv"
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    console = Console()
    for name, value in row.items():
        console.print(f"  {name:<14}{value}", highlight=False)
    for wrong in tally.wrong[:20]:
        console.print(f"  [red]{wrong}[/red]", highlight=False)


def main() -> None:
    default = Asked()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos")
    parser.add_argument("--model", choices=sorted(STEPS), default=default.model)
    parser.add_argument("--requests", type=int, default=default.requests)
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--gap", type=float, default=default.gap, help="seconds between faults")
    parser.add_argument("--deadline", type=float, default=default.deadline)
    given = parser.parse_args()
    asked = Asked(
        given.model, given.requests, given.seconds, given.seed, given.gap, deadline=given.deadline
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        outcome = asyncio.run(chaos(asked, progress))
    _write(asked, outcome)
    sys.exit(0 if outcome.good else 1)


if __name__ == "__main__":
    main()
