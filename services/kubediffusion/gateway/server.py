# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The gateway's doors: gRPC with health and reflection, HTTP, and metrics, on one event loop."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from kubediffusion import heap, rpc
from kubediffusion.errors import Unavailable
from kubediffusion.gateway.core import Gateway
from kubediffusion.gateway.keys import ApiKeys
from kubediffusion.gateway.readiness import Readiness
from kubediffusion.gateway.service import GatewayService
from kubediffusion.telemetry.metrics import serve_metrics
from kubediffusion.telemetry.tracing import configure as configure_tracing
from kubediffusion.v1alpha1 import gateway_pb2, gateway_pb2_grpc

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

log = logging.getLogger(__name__)

SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["Gateway"].full_name
LIVENESS = "liveness"
MAX_CONCURRENT_RPCS = 4096
# Longer than any stream: activation, a queue and a large batch of images.
GRACE = 3600.0


@dataclass(frozen=True, slots=True)
class Doors:
    """Where a gateway listens: "host:port" (port 0 takes a free one) or "unix:/path"; None: not."""

    grpc: str | None = None
    http: str | None = None
    metrics: str | None = None
    # A gRPC connection is that old, in seconds, and its client then makes another one, which may
    # well lead to another gateway; 0: for ever. Calls under way on the old one have `GRACE`.
    grpc_age: float = 0.0
    # Whether images may be asked for by URL: only where whoever reads it comes to this gateway.
    image_urls: bool = True


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where it really listens, ports filled in."""

    grpc: str = ""
    http: str = ""
    metrics: str = ""


@dataclass(frozen=True, slots=True)
class Stopping:
    """Seconds. `drain`: what is under way when the doors close may take so long to end."""

    drain: float = 5.0
    # What was answered may take so long to be read.
    flush: float = 2.0

    @property
    def longest(self) -> float:
        return self.drain + self.flush


class Door(Protocol):
    async def stop(self, seconds: float) -> None:
        """Takes no connection and no new request; returns when those it has are answered, or cuts
        them off after so many seconds."""


@asynccontextmanager
async def serve(
    gateway: Gateway,
    doors: Doors,
    *,
    api_keys: frozenset[str] | None = None,
    public_url: str = "",
    drain_seconds: float = 5.0,
    readiness: Readiness | None = None,
) -> AsyncIterator[Addresses]:
    """Serves a gateway that was started, as long as the context is open.

    On the way out nothing new is taken, and what is under way has `drain_seconds` to end; what has
    not is told to go to another gateway. The gateway takes nothing any more then. With `api_keys`,
    callers of both faces must bring one. Spans of the requests go where the environment's OTEL_*
    says, if anywhere (see `telemetry.tracing`). Raises Unavailable, reason PortInUse, naming the
    address.
    """
    keys = None if api_keys is None else ApiKeys(api_keys)
    open_doors: list[Door] = []
    async with AsyncExitStack() as stack:
        heap.settle()
        stack.callback(heap.unsettle)
        tracing = configure_tracing("kubediffusion-gateway")
        stack.push_async_callback(asyncio.to_thread, tracing.close)
        metrics = await _serve_metrics(gateway, doors.metrics, stack)
        stack.push_async_callback(_close, gateway, open_doors, Stopping(drain_seconds))
        grpc_address = http = ""
        if doors.grpc is not None:
            service = GatewayService(gateway, tracing, keys)
            door = GrpcDoor(service, readiness or Readiness(), doors.grpc_age)
            grpc_address = await door.open(doors.grpc)
            open_doors.append(door)
        if doors.http is not None:
            app = functools.partial(
                _http_app,
                gateway,
                tracing=tracing,
                api_keys=api_keys,
                public_url=public_url,
                readiness=readiness,
                image_urls=doors.image_urls,
            )
            http_door = HttpDoor()
            http = await http_door.open(app, doors.http)
            open_doors.append(http_door)
        yield Addresses(grpc_address, http, metrics)


async def _close(gateway: Gateway, doors: list[Door], stopping: Stopping) -> None:
    """The doors close first, and those who are inside already are given their time."""
    closing = [asyncio.create_task(door.stop(stopping.longest)) for door in doors]
    await asyncio.sleep(0)
    try:
        await gateway.drain(stopping.drain)
    finally:
        await asyncio.gather(*closing, return_exceptions=True)


async def _serve_metrics(gateway: Gateway, address: str | None, stack: AsyncExitStack) -> str:
    if address is None:
        return ""
    host, port = _host_and_port(address)
    registry = gateway.measures.registry
    server = await asyncio.to_thread(serve_metrics, registry, host, port)
    stack.push_async_callback(asyncio.to_thread, server.close)
    return f"{host}:{server.port}"


class GrpcDoor:
    """The gRPC face with health and reflection.

    Health under "" and the service's name is readiness; under "liveness" it is always SERVING,
    since only an event loop that turns can answer.
    """

    def __init__(self, service: GatewayService, readiness: Readiness, age: float = 0.0) -> None:
        self._service = service
        self._readiness = readiness
        self._health = HealthServicer()
        self._server = grpc.aio.server(
            options=(*rpc.SERVER_OPTIONS, *_ageing(age)),
            maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS,
        )
        self._telling: set[asyncio.Task[None]] = set()

    async def open(self, address: str) -> str:
        """Where it listens. Raises Unavailable."""
        server = self._server
        gateway_pb2_grpc.add_GatewayServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((SERVICE, health, reflection.SERVICE_NAME), server)
        bound = rpc.bind(server, address)
        await server.start()
        for name in (LIVENESS, health):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._tell()
        self._readiness.on_change = self._tell_soon
        return bound

    async def stop(self, seconds: float) -> None:
        self._readiness.on_change = lambda: None
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(seconds)

    async def _tell(self) -> None:
        kind = health_pb2.HealthCheckResponse
        status = kind.NOT_SERVING if self._readiness.why else kind.SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    def _tell_soon(self) -> None:
        task = asyncio.ensure_future(self._tell())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)


def _ageing(age: float) -> rpc.Options:
    """gRPC adds a tenth of it, more or less, so that not all clients come back at once."""
    if not age:
        return ()
    return (
        ("grpc.max_connection_age_ms", int(age * 1000)),
        ("grpc.max_connection_age_grace_ms", int(GRACE * 1000)),
    )


def _http_app(gateway: Gateway, **options: Any) -> FastAPI:
    from kubediffusion.gateway.http import build_app

    return build_app(gateway, metrics=gateway.measures.metrics, **options)


class HttpDoor:
    """The HTTP face on uvicorn."""

    async def open(self, app: Callable[[], FastAPI], address: str) -> str:
        """Where it listens. Raises Unavailable."""
        import uvicorn

        self._listener = listener = _listen(address)
        config = uvicorn.Config(app(), log_config=None, access_log=False, lifespan="on", ws="none")
        self._server = uvicorn.Server(config)
        # The process' signals are its owner's.
        self._serving = asyncio.create_task(_without_signals(self._server, listener), name="http")
        if listener.family == socket.AF_UNIX:
            return address
        host, port = listener.getsockname()[:2]
        return f"{host}:{port}"

    async def stop(self, seconds: float) -> None:
        self._server.should_exit = True
        await asyncio.wait([self._serving], timeout=seconds)
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self._listener.close()


async def _without_signals(server: uvicorn.Server, listener: socket.socket) -> None:
    """`Server.serve` without its signal handlers."""
    await server._serve([listener])


def _listen(address: str) -> socket.socket:
    """A listening socket of our own: uvicorn would exit the process where it cannot bind."""
    try:
        if address.startswith("unix:"):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(address.removeprefix("unix:"))
        else:
            host, port = _host_and_port(address)
            listener = socket.create_server((host, port), reuse_port=False, backlog=1024)
    except OSError as error:
        why = (
            "another process holds it"
            if error.errno == errno.EADDRINUSE
            else error.strerror or str(error)
        )
        raise Unavailable(
            f"cannot serve HTTP on {address}: {why}; stop that process or choose another address",
            reason="PortInUse" if error.errno == errno.EADDRINUSE else "AddressUnavailable",
        ) from error
    listener.setblocking(False)
    return listener


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise Unavailable(
            f'{address!r} is no address: write "host:port", such as "127.0.0.1:8080"',
            reason="AddressUnavailable",
        )
    return host.strip("[]") or "0.0.0.0", int(port)
