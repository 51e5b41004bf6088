# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`kubediffusion up`: serve until told to stop, and show how it goes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.live import Live

from kubediffusion.cli import shell
from kubediffusion.local.folders import RunState
from kubediffusion.local.process import warm_up
from kubediffusion.local.runtime import NODE_MODULES, LocalRuntime
from kubediffusion.local.supervisor import NodePhase, NodeReport

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kubediffusion.gateway.server import Addresses, Doors

_REFRESH = 0.25


@dataclass(frozen=True)
class Serving:
    """What `up` was asked for; an address may be "off"."""

    files: Sequence[Path]
    http: str
    grpc: str
    metrics: str
    replicas: Mapping[str, int]
    policy: str
    profiles: Path | None
    api_keys: frozenset[str]
    drain_seconds: float


def serve(asked: Serving) -> None:
    # torch is imported over there while everything else happens here.
    warm_up(NODE_MODULES)
    shell.run_async(_Up(asked).run())


class _Up:
    def __init__(self, asked: Serving) -> None:
        self._asked = asked
        self._console = shell.output()
        self._stop = asyncio.Event()
        self._phases: dict[str, NodePhase] = {}

    async def run(self) -> None:
        from kubediffusion.gateway import server
        from kubediffusion.gateway.config import GatewayConfig

        self._on_signals_cancel()
        asked = self._asked
        async with AsyncExitStack() as stack:
            runtime = LocalRuntime(
                asked.files,
                replicas=asked.replicas,
                serve_metrics=asked.metrics != "off",
                drain_seconds=asked.drain_seconds,
                gateway=GatewayConfig(policy=asked.policy, profiles=asked.profiles),
                on_change=None if self._console.is_terminal else self._line,
            )
            await stack.enter_async_context(runtime)
            log = stack.enter_context((runtime.folder.path / "gateway.log").open("a"))
            stream = log if self._console.is_terminal else sys.stderr
            stack.enter_context(shell.logging_to(stream))
            addresses = await stack.enter_async_context(
                server.serve(
                    runtime.gateway,
                    _doors(asked),
                    api_keys=asked.api_keys or None,
                    drain_seconds=asked.drain_seconds,
                )
            )
            await self._serve(runtime, addresses)
        self._console.print("  stopped", style="dim")

    async def _serve(self, runtime: LocalRuntime, addresses: Addresses) -> None:
        self._on_signals_stop()
        runtime.folder.publish(
            RunState(
                pid=os.getpid(),
                grpc=addresses.grpc,
                http=addresses.http,
                metrics=addresses.metrics,
                workflows=tuple(runtime.workflows),
            )
        )
        self._show_addresses(runtime, addresses)
        stopping = asyncio.ensure_future(self._stop.wait())
        ready = asyncio.ensure_future(runtime.ready())
        showing = asyncio.ensure_future(self._show_nodes(runtime))
        try:
            await asyncio.wait({ready, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
                if not self._console.is_terminal:
                    self._console.print("ready")
            await stopping
        finally:
            for task in (ready, stopping, showing):
                task.cancel()
            await asyncio.gather(ready, stopping, showing, return_exceptions=True)
        under_way = runtime.gateway.status()
        count = under_way.running + under_way.queued + under_way.held
        wait = f"; {count} under way may take {self._asked.drain_seconds:g} s" if count else ""
        self._console.print(f"  stopping{wait}", style="dim")

    # ------------------------------------------------------------ signals

    def _on_signals_cancel(self) -> None:
        """While nothing is served yet, a signal just ends it."""
        task = asyncio.current_task()
        assert task is not None
        self._handle(task.cancel)

    def _on_signals_stop(self) -> None:
        """The first signal drains; the second cuts the drain short."""
        task = asyncio.current_task()
        assert task is not None

        def stop() -> None:
            if self._stop.is_set():
                task.cancel()
            self._stop.set()

        self._handle(stop)

    def _handle(self, action: Callable[[], object]) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, action)

    # ------------------------------------------------------------ what is seen

    def _show_addresses(self, runtime: LocalRuntime, addresses: Addresses) -> None:
        from kubediffusion.cli.screens import addresses_table, commands_to_try

        grpc, http, metrics = addresses.grpc, addresses.http, addresses.metrics
        targets = str(runtime.folder.path / "prometheus.json")
        names = tuple(runtime.workflows)
        self._console.print()
        self._console.print(
            addresses_table(grpc=grpc, http=http, metrics=metrics, targets=targets, workflows=names)
        )
        key_needed = bool(self._asked.api_keys)
        for command in commands_to_try(
            grpc=grpc, http=http, workflows=names, key_needed=key_needed
        ):
            self._console.print(f"\n{command}", markup=False, soft_wrap=True)
        self._console.print()

    async def _show_nodes(self, runtime: LocalRuntime) -> None:
        """On a terminal: a table that stays in its place."""
        if not self._console.is_terminal:
            return
        from kubediffusion.cli.screens import supervised_nodes
        from kubediffusion.client.records import status_of

        def screen() -> RenderableType:
            status = status_of(runtime.gateway.status())
            return supervised_nodes(runtime.supervisor.reports(), status.nodes)

        with Live(screen(), console=self._console, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(_REFRESH)
                live.update(screen(), refresh=True)

    def _line(self, report: NodeReport) -> None:
        """Elsewhere: a line for each change."""
        if self._phases.get(report.name) is report.phase:
            return
        self._phases[report.name] = report.phase
        text = f": {report.message}" if report.message else ""
        self._console.print(f"node {report.name} {report.phase.value}{text}", markup=False)


def _doors(asked: Serving) -> Doors:
    from kubediffusion.gateway.server import Doors

    def door(address: str) -> str | None:
        return None if address in ("", "off") else address

    return Doors(grpc=door(asked.grpc), http=door(asked.http), metrics=door(asked.metrics))
