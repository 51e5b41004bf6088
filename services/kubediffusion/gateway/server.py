# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The gateway's doors: gRPC with health and reflection, HTTP, and metrics, on one event loop."""

from __future__ import annotations

import asyncio
import errno
import functools
import gc
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from kubediffusion import rpc
from kubediffusion.errors import Unavailable
from kubediffusion.gateway.core import Gateway
from kubediffusion.gateway.service import GatewayService
from kubediffusion.telemetry.metrics import serve_metrics
from kubediffusion.telemetry.tracing import configure as configure_tracing
from kubediffusion.v1alpha1 import gateway_pb2, gateway_pb2_grpc

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

log = logging.getLogger(__name__)

SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["Gateway"].full_name
MAX_CONCURRENT_RPCS = 4096


@dataclass(frozen=True, slots=True)
class Doors:
    """Where a gateway listens: "host:port" (port 0 takes a free one) or "unix:/path"; None: not."""

    grpc: str | None = None
    http: str | None = None
    metrics: str | None = None


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where it really listens, ports filled in."""

    grpc: str = ""
    http: str = ""
    metrics: str = ""


@asynccontextmanager
async def serve(
    gateway: Gateway,
    doors: Doors,
    *,
    api_keys: frozenset[str] | None = None,
    public_url: str = "",
    drain_seconds: float = 5.0,
) -> AsyncIterator[Addresses]:
    """Serves a gateway that was started, as long as the context is open.

    On the way out nothing new is taken, and what is under way has `drain_seconds` to end. Spans of
    the requests go where the environment's OTEL_* says, if anywhere (see `telemetry.tracing`).
    Raises Unavailable, reason PortInUse, naming the address.
    """
    async with AsyncExitStack() as stack:
        # All that was imported and built up to here stays: a full collection, which stops the
        # loop, need not walk it again.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        tracing = configure_tracing("kubediffusion-gateway")
        stack.push_async_callback(asyncio.to_thread, tracing.close)
        metrics = await _serve_metrics(gateway, doors.metrics, stack)
        service = GatewayService(gateway, tracing)
        grpc_address = await _serve_grpc(service, doors.grpc, drain_seconds, stack)
        http = ""
        if doors.http is not None:
            app = functools.partial(
                _http_app, gateway, tracing=tracing, api_keys=api_keys, public_url=public_url
            )
            http = await _serve_http(app, doors.http, stack)
        yield Addresses(grpc_address, http, metrics)


async def _serve_metrics(gateway: Gateway, address: str | None, stack: AsyncExitStack) -> str:
    if address is None:
        return ""
    host, port = _host_and_port(address)
    registry = gateway.measures.registry
    server = await asyncio.to_thread(serve_metrics, registry, host, port)
    stack.push_async_callback(asyncio.to_thread, server.close)
    return f"{host}:{server.port}"


async def _serve_grpc(
    service: GatewayService, address: str | None, drain_seconds: float, stack: AsyncExitStack
) -> str:
    if address is None:
        return ""
    server = grpc.aio.server(
        options=rpc.SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS
    )
    gateway_pb2_grpc.add_GatewayServicer_to_server(service, server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
    bound = rpc.bind(server, address)
    await server.start()
    for name in ("", *names):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    # In reverse: first say that no more is taken, then let what is under way end.
    stack.push_async_callback(server.stop, drain_seconds)
    stack.push_async_callback(health.enter_graceful_shutdown)
    return bound


def _http_app(gateway: Gateway, **options: Any) -> FastAPI:
    from kubediffusion.gateway.http import build_app

    return build_app(gateway, metrics=gateway.measures.metrics, **options)


async def _serve_http(app: Callable[[], FastAPI], address: str, stack: AsyncExitStack) -> str:
    import uvicorn

    listener = _listen(address)
    stack.callback(listener.close)
    config = uvicorn.Config(app(), log_config=None, access_log=False, lifespan="on", ws="none")
    server = uvicorn.Server(config)
    # The process' signals are its owner's.
    serving = asyncio.create_task(_without_signals(server, listener), name="http")

    async def stop() -> None:
        server.should_exit = True
        await asyncio.wait([serving], timeout=10.0)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

    stack.push_async_callback(stop)
    if listener.family == socket.AF_UNIX:
        return address
    host, port = listener.getsockname()[:2]
    return f"{host}:{port}"


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
