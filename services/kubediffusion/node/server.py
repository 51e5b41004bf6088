# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A node's parts put together, on the event loop that starts it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import grpc.aio
from google.protobuf import json_format
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from kubediffusion import rpc, tensors
from kubediffusion.errors import InvalidInput, Unavailable
from kubediffusion.node.config import NodeConfig, compile_cache, thread_count
from kubediffusion.node.core import Node
from kubediffusion.node.device import Device
from kubediffusion.node.fingerprint import fingerprint
from kubediffusion.node.inputs import Inputs
from kubediffusion.node.library import Library
from kubediffusion.node.pulse import Pulse
from kubediffusion.node.residency import Residency
from kubediffusion.node.service import Service
from kubediffusion.node.session import PROTOCOL
from kubediffusion.scheduling.order import Limits
from kubediffusion.telemetry.metrics import MetricsServer, NodeMetrics, serve_metrics
from kubediffusion.tensors import Fetcher, TensorStore
from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc

SERVICE = node_pb2.DESCRIPTOR.services_by_name["ModelNode"].full_name
# Health under this name is for a liveness probe: see `pulse`. Under "" and the service's own name
# it is readiness: every planned model is there or has failed, and the node takes tasks.
LIVENESS = "liveness"
TICK_SECONDS = 1.0
# Gateways may learn a moment after this node that their workflow is gone, and that they need it.
HEAR_SECONDS = 1.0
# Once drained, gateways get so long to end the calls they have open.
GRACE_SECONDS = 1.0

log = logging.getLogger(__name__)


class NodeServer:
    """A whole node in this process: `start`, then `drain` or `stop`."""

    def __init__(
        self,
        config: NodeConfig,
        library: Library,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.address = ""
        self.registry = CollectorRegistry()
        # The node has to end: asked by a Drain message, or because of one of the two below.
        self.drain_asked = asyncio.Event()
        # The device is past help, or none of the planned models ever will serve: why. No drain
        # helps then, so `broken` cuts short one that is under way.
        self.poisoned = ""
        self.failure = ""
        self.broken = asyncio.Event()
        self._now = now
        metrics = NodeMetrics(self.registry)
        threads = thread_count(config)
        self.fingerprint = fingerprint(config.device, threads)
        self.store = TensorStore(
            config.node_id,
            budget_bytes=config.tensor_budget,
            shm_dir=config.shm_dir,
            now=now,
        )
        limits = Limits(max_batch=config.max_batch)
        self.device = Device(self.store, self.fingerprint, threads=threads, limits=limits, now=now)
        self.residency = Residency(
            self.device,
            library,
            metrics,
            device_name=config.device,
            memory_limit=config.memory_limit,
            compile_cache=compile_cache(config),
            drain_seconds=config.drain_seconds,
            now=now,
            on_change=self._changed,
        )
        self._inputs = Inputs(Fetcher(self.store), library.fetch_lora)
        self.node = Node(
            self.describe,
            store=self.store,
            device=self.device,
            inputs=self._inputs,
            residency=self.residency,
            metrics=metrics,
            max_tasks=config.max_tasks,
            now=now,
            on_drain=self.drain_asked.set,
            on_poisoned=self._poison,
        )
        self._metrics = metrics
        self._metrics_server: MetricsServer | None = None
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._background: set[asyncio.Task[None]] = set()
        self._pulse = Pulse(now)
        self._ailing = False
        self._serving: bool | None = None
        self._stopped = False
        self._grpc: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listens. Raises Unavailable where an address or port is taken."""
        config = self.config
        if config.shm_dir is not None:
            tensors.sweep(config.shm_dir)
        server = self._grpc = grpc.aio.server(options=rpc.SERVER_OPTIONS)
        service = Service(self.node, self.residency, self.store, self._metrics, self.describe)
        node_pb2_grpc.add_ModelNodeServicer_to_server(service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        _check_free(config.address)
        self.address = rpc.bind(server, config.address)
        self.store.address = config.advertise or self.address
        if config.metrics_port is not None:
            self._metrics_server = serve_metrics(
                self.registry, config.metrics_host, config.metrics_port
            )
        await self._set_health(False)
        self.device.start(self.node)
        await self._set_liveness()
        self.residency.start()
        if config.residency is not None:
            plan = read_plan(config.residency)
            self.residency.plan(plan.generation, plan.planner, plan.models)
        await server.start()
        self.node.reporter.now()
        self._spawn(self._tick())
        if config.announce_path is not None:
            announce(config.announce_path, self.store.address, self.metrics_address)
        log.info("node %s listens on %s", config.node_id, self.address)

    @property
    def metrics_address(self) -> str:
        if self._metrics_server is None:
            return ""
        return f"{self.config.metrics_host}:{self._metrics_server.port}"

    async def drain(self) -> None:
        """Gives every task back or ends it; serves tensors until released, and what gateways need
        until they do not, or time is up.

        Ends at once where the device breaks: what is on it will never be given back.
        """
        self.node.draining = True
        await self._set_health(False)
        work = asyncio.ensure_future(self._give_back())
        broken = asyncio.ensure_future(self.broken.wait())
        try:
            await asyncio.wait(
                {work, broken},
                timeout=self.config.drain_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for each in (work, broken):
                each.cancel()
            await asyncio.gather(work, broken, return_exceptions=True)
        if not self.broken.is_set():
            log.info("node %s is drained", self.config.node_id)

    async def _give_back(self) -> None:
        hearing = asyncio.sleep(HEAR_SECONDS if self.node.sessions else 0.0)
        await asyncio.gather(self.node.drain(), hearing)
        await self.node.forsaken()

    async def stop(self, grace: float = GRACE_SECONDS) -> None:
        """Ends every call, frees everything. Safe to call again."""
        if self._stopped:
            return
        self._stopped = True
        for task in self._background:
            task.cancel()
        self.node.reporter.stop()
        for session in list(self.node.sessions.values()):
            self.node.close(session)
        await self.node.assisting.stop()
        if self._grpc is not None:
            await self._grpc.stop(grace)
        await self.residency.stop()
        if not await asyncio.to_thread(self.device.close, grace):
            log.warning("the device is still busy")
        await self._inputs.close()
        if self._metrics_server is not None:
            self._metrics_server.close()
        self.store.close()

    def describe(self) -> node_pb2.DescribeResponse:
        return node_pb2.DescribeResponse(
            node_id=self.config.node_id,
            incarnation=self.store.incarnation,
            address=self.store.address,
            host_id=tensors.host_id(),
            device=self.config.device,
            fingerprint=self.fingerprint,
            memory_limit=self.config.memory_limit,
            models=self.residency.statuses(),
            residency_generation=self.residency.generation,
            load=self.node.reporter.load(),
            protocol=PROTOCOL,
            version=version("kubediffusion"),
        )

    # ------------------------------------------------------------ inside

    def _changed(self) -> None:
        """The residency changed: gateways and the health service hear of it now."""
        if self._grpc is None or self._stopped:
            return
        self.node.reporter.now()
        if self.config.exit_on_failure and (why := self.residency.hopeless):
            self.failure = why
            self._break()
        # A node that serves goes on while ControlNets come to it.
        going_on = bool(self._serving) and self.residency.serves
        serving = (self.residency.settled or going_on) and not self.node.draining
        if serving != self._serving:
            self._serving = serving
            self._spawn(self._set_health(serving))

    async def _set_health(self, serving: bool) -> None:
        self._serving = serving
        kind = health_pb2.HealthCheckResponse
        status = kind.SERVING if serving else kind.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def _set_liveness(self) -> None:
        """That we answer at all says that the loop turns; what we say is about the device."""
        trouble = self._pulse.trouble(
            self.device.running,
            alive=self.device.alive,
            poisoned=self.poisoned,
            busy=self.residency.busy,
        )
        kind = health_pb2.HealthCheckResponse
        if trouble and not self._ailing:
            log.critical("the node cannot go on: %s", trouble)
        self._ailing = bool(trouble)
        await self._health.set(LIVENESS, kind.NOT_SERVING if trouble else kind.SERVING)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.node.tick()
            await self._set_liveness()

    def _spawn(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[arg-type]
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _poison(self, message: str) -> None:
        log.critical("the device is past help, the node ends: %s", message)
        self.poisoned = message or "the device failed"
        self._spawn(self._set_liveness())
        self._break()

    def _break(self) -> None:
        self.broken.set()
        self.drain_asked.set()


def _check_free(address: str) -> None:
    """gRPC replaces a socket file whoever listens on it: a live owner must be seen before."""
    if not address.startswith("unix:"):
        return
    path = address.removeprefix("unix:")
    path = path.removeprefix("//") if path.startswith("//") else path
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return
    raise Unavailable(
        f"cannot listen on {address}: another process does; stop it or choose another path",
        field="address",
        reason="PortInUse",
    )


def announce(path: Path, address: str, metrics: str) -> None:
    """Whoever sees the file sees all of it."""
    text = json.dumps({"address": address, "metrics": metrics, "pid": os.getpid()})
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def read_plan(path: Path) -> node_pb2.SetResidencyRequest:
    """A SetResidencyRequest in protobuf's JSON, without what only a newer planner knows, of which a
    warning tells. Raises InvalidInput."""
    try:
        text = path.read_text()
        try:
            return json_format.Parse(text, node_pb2.SetResidencyRequest())
        except json_format.ParseError as error:
            # As gRPC does with what a planner sends.
            known = json_format.Parse(
                text, node_pb2.SetResidencyRequest(), ignore_unknown_fields=True
            )
            log.warning("%s: going on without what is not known here: %s", path, error)
            return known
    except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
        raise InvalidInput(f"{path}: {error}", field="residency") from error
