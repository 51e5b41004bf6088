# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The processes that faults happen to: nodes behind relays, and gateways with one database."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from benchmarks.chaos.relay import Relay
from benchmarks.peers.standin_service import NoFiles, three_stages
from kubediffusion.local.plan import Machine, plan_nodes
from kubediffusion.local.specs import model_spec
from kubediffusion.v1alpha1 import node_pb2
from kubediffusion.workflow import ResolvedWorkflow

CHECKPOINT_EVERY = 4
# Seconds. Shorter than a fleet would have them: there is only so much time to see them at work.
LEASE, SUSPECT, DEAD = 10, 1.0, 3.0
JOB_LEASE, JOB_BEAT = 3.0, 0.5
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["kubediffusion.node.process", "kubediffusion.models.sd3", "kubediffusion.gateway.server"]
)


def workflow_of(model: str, step_seconds: float) -> ResolvedWorkflow:
    """`standin`, whose steps take so long, or a workflow file of examples/ by its name."""
    if model == "standin":
        return three_stages({"step_seconds": str(step_seconds)})
    from kubediffusion.local.workflows import resolve_files

    return resolve_files([Path("examples") / f"{model}.yaml"])[0]


class Process:
    """Killed and started again at the same address."""

    def __init__(self, name: str, target: Any, arguments: Sequence[Any]) -> None:
        self.name = name
        self._target = target
        self._arguments = tuple(arguments)
        self._process: Any = None

    async def start(self) -> None:
        self._process = _context.Process(target=self._target, args=self._arguments, daemon=True)
        await asyncio.to_thread(self._process.start)

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await asyncio.to_thread(self._process.join, 60)

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    async def stop(self) -> None:
        if self._process is not None and self._process.is_alive():
            await self.kill()


@dataclass(frozen=True)
class Node:
    process: Process
    relay: Relay


class Fleet:
    """An async context manager: everything runs inside it, and nothing after it."""

    def __init__(self, workflow: ResolvedWorkflow, folder: Path) -> None:
        roles = [r for r in ("text_encoder", "transformer", "vae") if r in workflow.models]
        plans = plan_nodes([workflow], dict.fromkeys(roles, 2), Machine(2, 8 << 30, threads=1))
        self.workflow = workflow
        self.nodes: list[Node] = []
        for plan in plans:
            residency = folder / f"{plan.name}.json"
            specs = [model_spec(model) for model in plan.models]
            content = node_pb2.SetResidencyRequest(generation=1, models=specs)
            residency.write_text(json_format.MessageToJson(content))
            relay = Relay(folder / f"{plan.name}.sock", folder / f"{plan.name}.back")
            arguments = (plan.name, f"unix:{folder}/{plan.name}.back", relay.address, residency)
            self.nodes.append(Node(Process(plan.name, _serve_node, arguments), relay))
        addresses = [node.relay.address for node in self.nodes]
        self.doors = [f"unix:{folder}/gateway-{number}.sock" for number in (1, 2)]
        database = f"sqlite:///{folder}/jobs.db"
        self.gateways = [
            Process(f"gateway-{number}", _serve_gateway, (door, addresses, workflow, database))
            for number, door in enumerate(self.doors, 1)
        ]

    async def __aenter__(self) -> Fleet:
        try:
            for node in self.nodes:
                await node.relay.start()
                await node.process.start()
            for gateway in self.gateways:
                await gateway.start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in (*self.gateways, *(node.process for node in self.nodes)):
            await process.stop()
        for node in self.nodes:
            await node.relay.close()


# ---------------------------------------------------------------- inside the processes


def _serve_node(name: str, address: str, advertise: str, residency: Path) -> None:
    from kubediffusion import models
    from kubediffusion.node.config import NodeConfig
    from kubediffusion.node.library import Library
    from kubediffusion.node.process import default_library, run_process

    Path(address.removeprefix("unix:")).unlink(missing_ok=True)
    config = NodeConfig(
        name,
        address,
        advertise=advertise,
        residency=residency,
        threads=1,
        exit_with_parent=True,
        log_level="CRITICAL",
    )
    standin = '"family": "standin"' in residency.read_text()
    nothing = Library(models.family, lambda uri, *_, **__: NoFiles(residency.parent / "none"))
    run_process(config, nothing if standin else default_library())


def _serve_gateway(
    door: str, nodes: Sequence[str], workflow: ResolvedWorkflow, database: str
) -> None:
    Path(door.removeprefix("unix:")).unlink(missing_ok=True)
    asyncio.run(_gateway(door, nodes, workflow, database))


async def _gateway(
    door: str, nodes: Sequence[str], workflow: ResolvedWorkflow, database: str
) -> None:
    from kubediffusion.gateway.config import GatewayConfig, JobLimits, NodeLimits
    from kubediffusion.gateway.core import Gateway
    from kubediffusion.gateway.server import Doors, serve
    from kubediffusion.scheduling.admission import AdmissionLimits

    config = GatewayConfig(
        nodes=NodeLimits(lease=LEASE, suspect=SUSPECT, dead=DEAD),
        jobs=JobLimits(lease=JOB_LEASE, beat=JOB_BEAT, checkpoint_every=0.5, running=64),
        # The load comes whatever happens: what piles up while a node is away is served later.
        admission=AdmissionLimits(max_queue=100_000),
        checkpoint_every=CHECKPOINT_EVERY,
        job_database=database,
    )
    gateway = Gateway(config)
    await gateway.start()
    gateway.set_workflows({workflow.name: workflow})
    gateway.set_nodes(list(nodes))
    async with serve(gateway, Doors(grpc=door)):
        await asyncio.Event().wait()
