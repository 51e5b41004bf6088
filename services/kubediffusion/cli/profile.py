# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`kubediffusion profile`: what a workflow costs on this machine, in files that others read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import yaml
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kubediffusion.cli import shell
from kubediffusion.cli.inputs import Typed, read_inputs
from kubediffusion.errors import InvalidInput

if TYPE_CHECKING:
    from kubediffusion.local.measure import Ask, Found
    from kubediffusion.workflow import ResolvedWorkflow, Value

MODELS, TRANSFERS, SETTING = "model_profiles.json", "transfer_profiles.json", "setting.yaml"
TRACE = "trace.txt"


@dataclass(frozen=True)
class Asked:
    file: Path
    output: Path
    typed: Typed
    sizes: Sequence[str]
    batches: Sequence[int]
    rounds: int


def profile(asked: Asked) -> None:
    """Starts the nodes, measures, stops them, and writes what `simulate` reads."""
    from kubediffusion.local.process import warm_up
    from kubediffusion.local.runtime import NODE_MODULES

    warm_up(NODE_MODULES)

    from kubediffusion.local.measure import Ask
    from kubediffusion.local.workflows import resolve_files
    from kubediffusion.simulate.measured import (
        model_profiles,
        setting_content,
        trace_text,
        transfer_profiles,
    )
    from kubediffusion.simulate.settings import costs_of, setting_of

    workflow = resolve_files([asked.file])[0]
    inputs = read_inputs(asked.typed, {name: str(s.type) for name, s in workflow.inputs.items()})
    ask = Ask(
        cast("dict[str, Value]", inputs),
        [_size(each) for each in asked.sizes],
        sorted({1, *asked.batches}),
        asked.rounds,
    )
    asked.output.mkdir(parents=True, exist_ok=True)
    found, same, other = shell.run_async(_measure(workflow, ask))
    models = model_profiles(found.loads, found.forwards, device=found.device, version=found.version)
    transfers = transfer_profiles(same, other)
    setting = setting_content(found.shape, gpus=1, node_bytes=float(found.memory_limit))
    pipelines = setting_of(setting, workflow.name).families.all()
    _write(asked.output / MODELS, json.dumps(models, indent=1))
    _write(asked.output / TRANSFERS, json.dumps(transfers, indent=1))
    _write(asked.output / SETTING, yaml.safe_dump(setting, sort_keys=False))
    _write(asked.output / TRACE, trace_text(pipelines, costs_of(models, transfers)))
    _show(asked.output, found, same, other)


async def _measure(
    workflow: ResolvedWorkflow, ask: Ask
) -> tuple[Found, dict[int, float], dict[int, float]]:
    from kubediffusion.local.measure import measure
    from kubediffusion.local.runtime import LocalRuntime
    from kubediffusion.local.transfers import measure_transfers

    columns = (TextColumn("  {task.description:<28}"), BarColumn(bar_width=36), TimeElapsedColumn())
    with Progress(*columns, console=shell.notes(), transient=True) as bars:
        bar = bars.add_task("loading models", total=None)

        def on_progress(what: str, done: int, total: int) -> None:
            bars.update(bar, description=what, completed=done, total=total)

        async with LocalRuntime(workflows=[workflow]) as runtime:
            await runtime.ready()
            found = await measure(runtime, workflow, ask, on_progress)
        bars.update(bar, description="tensors between processes")
        same, other = await asyncio.to_thread(measure_transfers, max(ask.rounds, 5))
    return found, same, other


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().replace("×", "x").partition("x")
    try:
        size = int(width), int(height)
    except ValueError:
        size = (0, 0)
    if min(size) < 1:
        raise InvalidInput(f"{text!r} is not of the form WIDTHxHEIGHT", field="--size")
    return size


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}", field="--output") from error


def _show(folder: Path, found: Found, same: dict[int, float], other: dict[int, float]) -> None:
    from kubediffusion.cli.screens import indented, table

    roles = {load.model: load.role for load in found.loads}
    numbers = ("batch", "ms", "a forward")
    grid = table("model", "stage", "size", *numbers, numbers=numbers)
    for each in found.forwards:
        grid.add_row(
            roles.get(each.model, each.model),
            each.stage,
            each.size,
            str(each.batch),
            f"{each.seconds * 1e3:.2f}",
            f"{each.seconds / each.batch * 1e3:.2f}",
        )
    loads = table("model", "load s", "weights", numbers=("load s", "weights"))
    for load in found.loads:
        loads.add_row(load.role, f"{load.seconds:.2f}", decimal(load.nbytes))
    ways = table("tensor", "here ms", "gRPC ms", numbers=("tensor", "here ms", "gRPC ms"))
    for nbytes in sorted(same):
        ways.add_row(decimal(nbytes), f"{same[nbytes] * 1e3:.3f}", f"{other[nbytes] * 1e3:.3f}")
    output = shell.output()
    for part in (grid, loads, ways):
        output.print(indented(part))
        output.print()
    output.print(
        f"  {folder}/: {MODELS}, {TRANSFERS}, {SETTING}, {TRACE}\n"
        f"  kubediffusion simulate --profiles {folder} --setting {folder / SETTING} "
        f"--trace {folder / TRACE} --rate 0.8",
        soft_wrap=True,
    )
