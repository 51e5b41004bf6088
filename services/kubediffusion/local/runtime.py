# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Workflow files served on one machine: node processes, and a gateway in this one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from kubediffusion.errors import Unavailable
from kubediffusion.local.folders import RunFolder
from kubediffusion.local.machine import this_machine
from kubediffusion.local.plan import plan_nodes
from kubediffusion.local.process import warm_up
from kubediffusion.local.restart import RestartPolicy
from kubediffusion.local.supervisor import NodeReport, Supervisor
from kubediffusion.telemetry.metrics import SupervisorMetrics

if TYPE_CHECKING:
    from kubediffusion.gateway.config import GatewayConfig
    from kubediffusion.gateway.core import Gateway
    from kubediffusion.v1alpha1 import gateway_pb2
    from kubediffusion.workflow import ResolvedWorkflow

T = TypeVar("T")

_POLL = 0.01
# What every node imports, families included; imported once, by the fork server.
NODE_MODULES = ("kubediffusion.node.process", "kubediffusion.models.sd3")


class LocalRuntime:
    """An async context manager; inside it the nodes run, and `ready` waits for their models.

        async with LocalRuntime([Path("examples/tiny-sd3.yaml")]) as runtime:
            await runtime.ready()
            async for event in runtime.generate(request): ...

    A script that uses it needs the ``if __name__ == "__main__":`` that multiprocessing asks for.
    """

    def __init__(
        self,
        files: Sequence[Path] = (),
        *,
        workflows: Sequence[ResolvedWorkflow] = (),
        replicas: Mapping[str, int] | None = None,
        device: str = "cpu",
        serve_metrics: bool = False,
        drain_seconds: float = 0.0,
        gateway: GatewayConfig | None = None,
        policy: RestartPolicy | None = None,
        on_change: Callable[[NodeReport], None] | None = None,
    ) -> None:
        """`replicas` maps a role to the number of its nodes; `drain_seconds` is for the exit."""
        self._files = tuple(files)
        self._given = tuple(workflows)
        self._replicas = dict(replicas or {})
        self._device = device
        self._serve_metrics = serve_metrics
        self._drain_seconds = drain_seconds
        self._gateway_config = gateway
        self._policy = policy
        self._on_change = on_change
        self._stack = AsyncExitStack()
        self.workflows: dict[str, ResolvedWorkflow] = {}
        self._folder: RunFolder | None = None
        self._supervisor: Supervisor | None = None
        self._gateway: Gateway | None = None

    @property
    def folder(self) -> RunFolder:
        return _started(self._folder)

    @property
    def supervisor(self) -> Supervisor:
        return _started(self._supervisor)

    @property
    def gateway(self) -> Gateway:
        return _started(self._gateway)

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def ready(self) -> None:
        """Until the gateway has every model it needs. Raises as Supervisor.wait_ready."""
        await self.supervisor.wait_ready()
        while not all(info.ready for info in self.gateway.list_workflows()):  # noqa: ASYNC110
            await asyncio.sleep(_POLL)

    def generate(
        self, request: gateway_pb2.GenerateRequest
    ) -> AsyncGenerator[gateway_pb2.GenerateEvent, None]:
        """See Gateway.generate."""
        return self.gateway.generate(request)

    async def _start(self) -> None:
        # torch is imported over there while everything else happens here.
        await asyncio.to_thread(warm_up, NODE_MODULES)
        machine = this_machine()
        resolved = [*self._given, *await asyncio.to_thread(_resolve, self._files)]
        self.workflows = {each.name: each for each in resolved}
        plans = plan_nodes(resolved, self._replicas, machine)

        self._folder = RunFolder()
        self._stack.callback(self._folder.close)
        self._supervisor = Supervisor(
            plans,
            self._folder,
            device=self._device,
            serve_metrics=self._serve_metrics,
            drain_seconds=self._drain_seconds,
            policy=self._policy,
            on_change=self._on_change,
        )
        self._stack.push_async_callback(self._supervisor.stop, self._drain_seconds)
        self._supervisor.start()
        self._gateway = await asyncio.to_thread(_gateway, self._gateway_config, self._folder.shm)
        self._supervisor.metrics = SupervisorMetrics(self._gateway.measures.registry)
        await self._gateway.start()
        self._stack.push_async_callback(self._gateway.stop, self._drain_seconds)
        self._gateway.set_workflows(self.workflows)
        self._gateway.set_nodes(self._supervisor.addresses)


def _resolve(files: Sequence[Path]) -> list[ResolvedWorkflow]:
    from kubediffusion.local.workflows import resolve_files

    return resolve_files(files)


def _gateway(config: GatewayConfig | None, shm_dir: Path) -> Gateway:
    from kubediffusion.gateway.config import GatewayConfig
    from kubediffusion.gateway.core import Gateway

    return Gateway(replace(config or GatewayConfig(), shm_dir=shm_dir))


def _started(part: T | None) -> T:
    if part is None:
        raise Unavailable("the runtime has not been started; use it as `async with`")
    return part
