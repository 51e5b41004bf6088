# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The process of a gateway in a cluster: from its flags to its exit code.

It ends in steps, so that no request is lost: on SIGTERM it is not ready any more, and serves on
until that has gone round (`--shutdown-delay`); then the doors close, and what is under way has
`--drain-seconds`; what is left is told to go to another gateway, which clients do by themselves.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path

from kubediffusion.cluster.api import Api
from kubediffusion.cluster.flags import Options, parse
from kubediffusion.cluster.follow import Follower
from kubediffusion.errors import KubeDiffusionError
from kubediffusion.gateway.config import GatewayConfig
from kubediffusion.gateway.core import Gateway
from kubediffusion.gateway.readiness import Readiness
from kubediffusion.gateway.server import Addresses, serve
from kubediffusion.scheduling.admission import AdmissionLimits
from kubediffusion.telemetry.logging import configure

log = logging.getLogger(__name__)


def main() -> None:
    options = parse()
    configure(options.log_level, json=options.log_json, gateway=options.gateway_id)
    try:
        asyncio.run(run(options))
    except KubeDiffusionError as error:
        log.error("the gateway cannot start: %s", error)
        sys.exit(1)


async def run(options: Options) -> None:
    """Serves until SIGTERM or SIGINT; a second one ends it at once. Raises KubeDiffusionError."""
    told = _on_signals()
    keys = options.api_keys()
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(
            await Api.connect(kubeconfig=options.kubeconfig, context=options.context)
        )
        gateway = Gateway(_config(options))
        await gateway.start()
        stack.push_async_callback(gateway.stop)
        readiness = Readiness()
        # Nodes come and go while the last requests end, so it follows until then.
        await stack.enter_async_context(
            Follower(api, gateway, options.namespace or api.namespace, readiness)
        )
        addresses = await stack.enter_async_context(
            serve(
                gateway,
                options.doors,
                api_keys=keys,
                public_url=options.public_url,
                drain_seconds=options.drain_seconds,
                readiness=readiness,
            )
        )
        log.info("gateway %s serves %s", gateway.config.gateway_id, addresses)
        if options.announce_path is not None:
            announce(options.announce_path, addresses)
        await told.wait()
        readiness.close("the gateway is shutting down")
        log.info("stopping: serving on for %g s", options.shutdown_delay)
        await asyncio.sleep(options.shutdown_delay)
        log.info("stopping: %d requests are under way", len(gateway.flights))


def _config(options: Options) -> GatewayConfig:
    return GatewayConfig(
        # Of this process alone: nodes keep what belongs to an id for as long as somebody with that
        # id is there, and a pod's next container must not keep what the one before it left behind.
        gateway_id=f"{options.gateway_id}-{secrets.token_hex(3)}",
        admission=AdmissionLimits(max_queue=options.max_queue),
        policy=options.policy,
        profiles=options.profiles,
        job_database=options.job_database,
        job_results=options.job_results,
        hooks=options.hooks,
    )


def announce(path: Path, addresses: Addresses) -> None:
    """Whoever sees the file sees all of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({**asdict(addresses), "pid": os.getpid()}))
    partial.replace(path)


def _on_signals() -> asyncio.Event:
    """Set by the first signal; the next one does what it does to any process."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)

    def on_signal() -> None:
        told.set()
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    return told
