# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`kubediffusion run` and `generate`: one request, seen from its start to its pictures."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kubediffusion.cli import shell
from kubediffusion.cli.inputs import Typed, read_inputs, read_loras
from kubediffusion.cli.pictures import Destination
from kubediffusion.client.events import Event, Finished, Image, event_of
from kubediffusion.errors import Internal, InvalidInput

if TYPE_CHECKING:
    from kubediffusion.cli.progress import GenerationView
    from kubediffusion.workflow import ResolvedWorkflow


@dataclass
class Result:
    """What came of a request."""

    workflow: str
    finished: Finished | None = None
    start_seconds: float | None = None
    pictures: list[tuple[Path, Image]] = field(default_factory=list[tuple[Path, Image]])

    def as_json(self) -> str:
        finished = self.finished
        content: dict[str, object] = {
            "workflow": self.workflow,
            "seconds": finished.seconds if finished else None,
            "start_seconds": self.start_seconds,
            "pictures": [
                {
                    "path": str(path),
                    "width": image.width,
                    "height": image.height,
                    "seed": image.seed,
                }
                for path, image in self.pictures
            ],
            "stages": [asdict(stage) for stage in finished.stages] if finished else [],
        }
        return json.dumps(content, indent=2)


# ---------------------------------------------------------------- on this machine, all of it


@dataclass(frozen=True)
class Here:
    """How the workflow is served meanwhile."""

    replicas: dict[str, int]
    policy: str


def run_here(file: Path, typed: Typed, target: Path, here: Here, *, as_json: bool) -> None:
    """Starts the nodes, generates, stops them."""
    from kubediffusion.local.process import warm_up
    from kubediffusion.local.runtime import NODE_MODULES

    # Before anything that takes time here: torch is imported over there meanwhile.
    warm_up(NODE_MODULES)
    started = time.monotonic()

    from kubediffusion.local.workflows import resolve_files

    resolved = resolve_files([file])[0]
    inputs = read_inputs(typed, {name: str(spec.type) for name, spec in resolved.inputs.items()})
    loras = read_loras(typed)
    _check(resolved, inputs, loras, typed.budget)
    destination = Destination(target, typed.count)
    result = shell.run_async(
        _run_here(resolved, inputs, loras, typed, destination, here, as_json, started)
    )
    _show_result(result, as_json)


def _check(
    resolved: ResolvedWorkflow,
    inputs: dict[str, object],
    loras: dict[str, float],
    budget: float | None,
) -> None:
    """What can be known to be wrong before anything is loaded."""
    from kubediffusion.workflow import bind, choose_budget

    # Defaults that come from a model are not known yet.
    known = replace(resolved, graph=replace(resolved.graph, defaults={}))
    bind(known, inputs, loras, {}, 0)
    choose_budget(resolved, budget, {})


async def _run_here(
    resolved: ResolvedWorkflow,
    inputs: dict[str, object],
    loras: dict[str, float],
    typed: Typed,
    destination: Destination,
    here: Here,
    as_json: bool,
    started: float,
) -> Result:
    from kubediffusion.cli.progress import GenerationView
    from kubediffusion.client.core import build_request
    from kubediffusion.gateway.config import GatewayConfig
    from kubediffusion.local.runtime import LocalRuntime

    request = build_request(
        resolved.name, "", inputs=inputs, loras=loras, n=typed.count, budget=typed.budget
    )
    if "seed" not in inputs:
        # A key of our own would give every run without a seed another one all the same.
        request.idempotency_key = ""
    result = Result(resolved.name)
    with GenerationView(shell.notes(), typed.count, quiet=as_json) as view:
        runtime = LocalRuntime(
            workflows=[resolved],
            replicas=here.replicas,
            gateway=GatewayConfig(policy=here.policy),
            on_change=view.node_changed,
        )
        view.starting(len(resolved.models))
        async with runtime:
            await runtime.ready()
            view.ready()
            result.start_seconds = time.monotonic() - started
            messages = runtime.generate(request)
            await _follow(_events(messages), view, destination, result)
    return result


async def _events(messages: AsyncGenerator[Any, None]) -> AsyncGenerator[Event, None]:
    async with aclosing(messages) as open_messages:
        async for message in open_messages:
            event = event_of(message)
            if event is not None:
                yield event


# ---------------------------------------------------------------- at a running gateway


def run_there(
    address: str, workflow: str, typed: Typed, target: Path, *, as_json: bool, api_key: str = ""
) -> None:
    """Sends one request to a gateway's gRPC address."""
    destination = Destination(target, typed.count)
    result = shell.run_async(_run_there(address, workflow, typed, destination, as_json, api_key))
    _show_result(result, as_json)


async def _run_there(
    address: str,
    workflow: str,
    typed: Typed,
    destination: Destination,
    as_json: bool,
    api_key: str,
) -> Result:
    from kubediffusion.cli.progress import GenerationView
    from kubediffusion.client import AsyncClient

    async with AsyncClient(address, api_key=api_key) as client:
        known = {each.name: each for each in await client.workflows()}
        chosen = known.get(workflow) if workflow else next(iter(known.values()), None)
        if chosen is None or (not workflow and len(known) > 1):
            names = ", ".join(sorted(known)) or "none"
            problem = f"no workflow {workflow!r}" if workflow else "say which workflow"
            raise InvalidInput(f"{problem}; {address} serves {names}", field="--workflow")
        inputs = read_inputs(typed, {spec.name: spec.type for spec in chosen.inputs})
        loras = read_loras(typed)
        result = Result(chosen.name)
        with GenerationView(shell.notes(), typed.count, quiet=as_json) as view:
            events = client.generate(
                chosen.name, inputs=inputs, loras=loras, n=typed.count, budget=typed.budget
            )
            await _follow(events, view, destination, result)
    return result


# ---------------------------------------------------------------- both


async def _follow(
    events: AsyncGenerator[Event, None],
    view: GenerationView,
    destination: Destination,
    result: Result,
) -> None:
    async with aclosing(events) as open_events:
        async for event in open_events:
            view.event(event)
            if isinstance(event, Image):
                path = await asyncio.to_thread(destination.write, event.index, event.png)
                result.pictures.append((path, event))
            elif isinstance(event, Finished):
                result.finished = event
    if result.finished is None:
        raise Internal("the stream of events ended before the request was finished")
    result.pictures.sort(key=lambda pair: pair[1].index)


def _show_result(result: Result, as_json: bool) -> None:
    from kubediffusion.cli.screens import time_table

    if as_json:
        shell.output().print(result.as_json(), markup=False, soft_wrap=True)
        return
    assert result.finished is not None
    notes, output = shell.notes(), shell.output()
    notes.print()
    notes.print(time_table(result.finished, result.start_seconds))
    notes.print()
    for path, image in result.pictures:
        details = f"  [dim]{image.width}×{image.height}, seed {image.seed}[/dim]"
        output.print(f"{path}" if not output.is_terminal else f"  [bold]{path}[/bold]{details}")
