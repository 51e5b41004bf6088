# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps the planned nodes alive and loaded. The planner of one machine.

Each node has a keeper: it starts the process, sends it the residency plan, watches its models load,
and does all that again when the process ends, without delay unless it keeps dying young.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import grpc

from kubediffusion import node, rpc
from kubediffusion.errors import KubeDiffusionError, Unavailable, UnsupportedModel
from kubediffusion.local.folders import RunFolder
from kubediffusion.local.plan import NodePlan
from kubediffusion.local.process import NodeProcess
from kubediffusion.local.restart import RestartPolicy, how_it_ended, restart_reason
from kubediffusion.local.specs import model_spec
from kubediffusion.node import NodeConfig
from kubediffusion.telemetry.metrics import SupervisorMetrics
from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc

log = logging.getLogger(__name__)

PLANNER = "local"
_POLL = 0.03
_LOG_LINES = 15
_WEIGHTS_AT_FAULT = frozenset({"BadWeights", "NotSafetensors", "WrongArchitecture"})


class NodePhase(Enum):
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class NodeReport:
    """A node as its keeper sees it now. `metrics` is the port that serves them, 0 for none."""

    name: str
    phase: NodePhase
    pid: int
    restarts: int
    models: tuple[node_pb2.ModelStatus, ...]
    metrics: int
    message: str = ""


class Supervisor:
    """All nodes of a run. `on_change` is called on the event loop with each report that is new."""

    def __init__(
        self,
        plans: Sequence[NodePlan],
        folder: RunFolder,
        *,
        device: str = "cpu",
        serve_metrics: bool = False,
        drain_seconds: float = 30.0,
        policy: RestartPolicy | None = None,
        metrics: SupervisorMetrics | None = None,
        on_change: Callable[[NodeReport], None] | None = None,
        serve: Callable[[NodeConfig], None] = node.run,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.serve = serve
        self.policy = policy or RestartPolicy()
        self.metrics = metrics
        self.now = now
        self._device = device
        self._serve_metrics = serve_metrics
        self._drain_seconds = drain_seconds
        self._on_change = on_change
        self._generations = itertools.count(1)
        self._keepers = [_Keeper(self, plan) for plan in plans]

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(self.folder.socket(keeper.plan.name) for keeper in self._keepers)

    def reports(self) -> tuple[NodeReport, ...]:
        return tuple(keeper.report() for keeper in self._keepers)

    def start(self) -> None:
        for keeper in self._keepers:
            keeper.start()

    async def wait_ready(self) -> None:
        """Until every model is loaded. Raises what is in the way: a model that cannot be loaded
        (UnsupportedModel, Unavailable), or a node that keeps dying (Unavailable, NodeCrashLoop).
        """
        waiting = [asyncio.ensure_future(keeper.first_ready) for keeper in self._keepers]
        await asyncio.gather(*map(asyncio.shield, waiting))

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Ends all nodes: asked to drain if there is time for it, killed after that."""
        await asyncio.gather(*(keeper.stop(drain_seconds) for keeper in self._keepers))

    # ------------------------------------------------------------ for the keepers

    def config(self, plan: NodePlan) -> NodeConfig:
        return NodeConfig(
            node_id=plan.name,
            address=self.folder.socket(plan.name),
            device=self._device,
            memory_limit=plan.memory_limit,
            metrics_port=0 if self._serve_metrics else None,
            shm_dir=self.folder.shm,
            drain_seconds=self._drain_seconds,
            threads=plan.threads,
            announce_path=self.folder.announcement(plan.name),
        )

    def next_generation(self) -> int:
        return next(self._generations)

    def changed(self, keeper: _Keeper) -> None:
        reports = self.reports()
        if self.metrics is not None:
            self.metrics.nodes.set(sum(1 for report in reports if report.pid))
        if self._serve_metrics:
            try:
                self.folder.write_json("prometheus.json", _targets(reports))
            except OSError as error:  # a full disk costs a list, not the nodes
                log.warning("cannot tell Prometheus of the nodes: %s", error)
        if self._on_change is not None:
            self._on_change(keeper.report())


class _Keeper:
    """One node's life after life."""

    def __init__(self, supervisor: Supervisor, plan: NodePlan) -> None:
        self.plan = plan
        self.first_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.first_ready.add_done_callback(_retrieve)
        self._supervisor = supervisor
        self._folder = supervisor.folder
        self._process: NodeProcess | None = None
        self._phase = NodePhase.STARTING
        self._message = ""
        self._models: tuple[node_pb2.ModelStatus, ...] = ()
        self._metrics_port = 0
        self._restarts = 0
        self._stopping = False
        self._ready_since: float | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep(), name=f"keep {self.plan.name}")

    def report(self) -> NodeReport:
        return NodeReport(
            name=self.plan.name,
            phase=self._phase,
            pid=self._process.pid if self._process is not None else 0,
            restarts=self._restarts,
            models=self._models,
            metrics=self._metrics_port,
            message=self._message,
        )

    async def stop(self, drain_seconds: float) -> None:
        task = self._task
        if task is not None:
            self._stopping = True
            if self._process is not None and drain_seconds > 0:
                self._process.signal(signal.SIGTERM)
                await asyncio.wait([task], timeout=drain_seconds)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._set(NodePhase.STOPPED)
        self.first_ready.cancel()

    async def _keep(self) -> None:
        young_deaths = 0
        while True:
            try:
                exit_code = await self._live()
            except (KubeDiffusionError, OSError) as error:
                young_deaths += 1
                self._fail(self._start_error(error))
            else:
                if self._stopping:
                    return
                young_deaths = 0 if self._lived_well() else young_deaths + 1
                self._died(exit_code, young_deaths)
            await asyncio.sleep(self._supervisor.policy.delay(young_deaths))

    def _died(self, exit_code: int, young_deaths: int) -> None:
        self._restarts += 1
        if self._supervisor.metrics is not None:
            self._supervisor.metrics.restarts.labels(restart_reason(exit_code)).inc()
        message = f"node {self.plan.name} {how_it_ended(exit_code)}"
        log.warning("%s; starting it again", message)
        if young_deaths >= self._supervisor.policy.crash_loop:
            self._fail(self._crash_loop(message, young_deaths))
        else:
            self._set(NodePhase.RESTARTING, message)

    async def _live(self) -> int:
        """One process from start to end; returns its exit code."""
        self._ready_since = None
        self._models = ()
        self._folder.announcement(self.plan.name).unlink(missing_ok=True)
        process = await NodeProcess.start(
            self._supervisor.config(self.plan),
            self._folder.log(self.plan.name),
            self._folder.path,
            self._supervisor.serve,
        )
        loading: asyncio.Task[None] | None = None
        try:
            self._process = process
            self._set(self._phase)
            loading = asyncio.create_task(self._load(), name=f"load {self.plan.name}")
            loading.add_done_callback(_log_failure)
            return await process.wait()
        finally:
            self._process = None
            self._metrics_port = 0
            if loading is not None:
                loading.cancel()
            await asyncio.shield(process.kill())

    async def _load(self) -> None:
        """Sends the plan and follows the models until they are ready."""
        address = await self._announced()
        channel = rpc.connect(address)
        try:
            stub: Any = node_pb2_grpc.ModelNodeStub(channel)
            while not await self._tried(stub):  # noqa: ASYNC110
                # A failed model of a node that once was ready: the source may come back.
                await asyncio.sleep(self._supervisor.policy.most)
        finally:
            await channel.close()

    async def _tried(self, stub: Any) -> bool:
        """`_carry_out`, again where a call fails: the keeper ends this when the process ends, and
        one that only was too busy to answer must get its models all the same."""
        while True:
            try:
                return await self._carry_out(stub)
            except grpc.RpcError as error:
                log.info("node %s: %s", self.plan.name, rpc.from_rpc_error(error))
            await asyncio.sleep(self._supervisor.policy.first)

    async def _carry_out(self, stub: Any) -> bool:
        """One SetResidency to its end. True when all models are ready."""
        request = node_pb2.SetResidencyRequest(
            generation=self._supervisor.next_generation(),
            planner=PLANNER,
            models=[model_spec(model) for model in self.plan.models],
        )
        self._set(NodePhase.LOADING, self._message)
        await stub.SetResidency(request, wait_for_ready=True, timeout=60)
        while True:
            described = await stub.Describe(node_pb2.DescribeRequest(), timeout=60)
            states = {model.identity: model for model in described.models}
            wanted = [states.get(model.identity) for model in self.plan.models]
            models = tuple(status for status in wanted if status is not None)
            if models != self._models:
                self._models = models
                self._set(self._phase, self._message)
            failed = [m for m in models if m.state == node_pb2.MODEL_STATE_FAILED]
            if failed:
                self._fail(self._load_error(failed[0]))
                return False
            if len(models) == len(self.plan.models) and all(
                m.state == node_pb2.MODEL_STATE_READY for m in models
            ):
                self._ready()
                return True
            await asyncio.sleep(_POLL)

    async def _announced(self) -> str:
        """The node's address, once it listens there."""
        path = self._folder.announcement(self.plan.name)
        while not path.exists():  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(_POLL)
        announcement = json.loads(path.read_text())
        self._metrics_port = _port(announcement.get("metrics"))
        return announcement["address"]

    def _ready(self) -> None:
        self._ready_since = self._supervisor.now()
        self._set(NodePhase.READY)
        if not self.first_ready.done():
            self.first_ready.set_result(None)

    def _lived_well(self) -> bool:
        since = self._ready_since
        return (
            since is not None and self._supervisor.now() - since >= self._supervisor.policy.healthy
        )

    def _fail(self, error: KubeDiffusionError) -> None:
        self._set(NodePhase.FAILED, str(error))
        if not self.first_ready.done():
            self.first_ready.set_exception(error)

    def _set(self, phase: NodePhase, message: str = "") -> None:
        self._phase = phase
        self._message = message
        self._supervisor.changed(self)

    def _crash_loop(self, message: str, deaths: int) -> Unavailable:
        path = self._folder.log(self.plan.name)
        tail = "\n".join(f"  {line}" for line in _tail(path)) or "  (its log is empty)"
        return Unavailable(
            f"{message}, {deaths} times in a row. The end of its log:\n{tail}",
            reason="NodeCrashLoop",
        )

    def _start_error(self, error: KubeDiffusionError | OSError) -> KubeDiffusionError:
        if isinstance(error, KubeDiffusionError):
            return error
        return Unavailable(f"cannot start node {self.plan.name}: {error}", reason="NodeStart")

    def _load_error(self, status: node_pb2.ModelStatus) -> KubeDiffusionError:
        role = next(m.role for m in self.plan.models if m.identity == status.identity)
        kind = UnsupportedModel if status.reason in _WEIGHTS_AT_FAULT else Unavailable
        message = status.message or "cannot be loaded"
        return kind(message, field=f"models.{role}", reason=status.reason)


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return text.splitlines()[-_LOG_LINES:]


def _port(announced: object) -> int:
    """ "metrics" in an announcement is a port, or an address that ends with one."""
    last = str(announced or "0").rpartition(":")[2].strip("/")
    return int(last) if last.isdigit() else 0


def _targets(reports: Sequence[NodeReport]) -> list[dict[str, object]]:
    """For Prometheus' file_sd_configs."""

    def targets() -> Iterator[dict[str, object]]:
        for report in reports:
            if report.metrics:
                target = f"127.0.0.1:{report.metrics}"
                yield {"targets": [target], "labels": {"job": "node", "node": report.name}}

    return list(targets())


def _retrieve(future: asyncio.Future[None]) -> None:
    """Nobody may be waiting for this one; asyncio need not complain."""
    if not future.cancelled():
        future.exception()


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("loading failed unexpectedly", exc_info=error)
