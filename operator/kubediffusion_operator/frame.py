# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The process around the operator: kopf begins it, ends it, and hears the signals.

kopf's handlers for objects are not used: after a watch was down they are not told of what is gone,
and one error event in a stream ends the process. docs/decisions/0006 has the measurements. Nothing
of kopf's is ever written on an object: no finalizers, no annotations.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import kopf
from kubernetes.aio.client.configuration import Configuration

from kubediffusion.cluster.api import Api
from kubediffusion.errors import KubeDiffusionError
from kubediffusion.telemetry.logging import configure
from kubediffusion_operator.flags import Options, parse
from kubediffusion_operator.process import Operator

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs until SIGTERM or SIGINT; exits with 1 and a message where it cannot start."""
    try:
        options = parse(arguments)
        configure(options.config.log_level, json=options.config.log_json)
        # What these do for us is told by ourselves.
        for noisy in ("kopf", "kubernetes", "grpc", "aiohttp.access"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        asyncio.run(run(options))
    except KubeDiffusionError as error:
        sys.exit(f"kubediffusion-operator: {error}")


async def run(options: Options) -> None:
    """Raises KubeDiffusionError where it cannot start."""
    api = await Api.connect(kubeconfig=options.kubeconfig, context=options.context)
    operator = Operator(options, api)
    stopped = asyncio.Event()
    namespace = options.config.namespace
    try:
        await operator.listen()
        await kopf.operator(
            registry=_handlers(api, operator, stopped),
            stop_flag=stopped,
            standalone=True,
            # Or kopf asks for the user's name, which the uid of a pod need not have.
            identity=socket.gethostname(),  # pyright: ignore[reportArgumentType]
            clusterwide=not namespace,
            namespaces=[namespace] if namespace else [],
        )
    finally:
        await operator.stop()


def _handlers(api: Api, operator: Operator, stopped: asyncio.Event) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    async def login(**_: Any) -> kopf.ConnectionInfo:
        return connection_info(api.configuration)

    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        _settle(settings)
        operator.start()

    async def stop(**_: Any) -> None:
        await operator.stop()
        stopped.set()  # or kopf waits 5 s for whoever waits for it

    kopf.on.login(registry=registry)(login)
    kopf.on.startup(registry=registry)(start)
    kopf.on.cleanup(registry=registry)(stop)
    return registry


def _settle(settings: kopf.OperatorSettings) -> None:
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.networking.request_timeout = 30.0
    # kopf gives the process up when its list of pauses ends; an API server may be away for longer.
    settings.networking.error_backoffs = _Pauses()
    settings.process.ultimate_exiting_timeout = 30.0


class _Pauses:
    """Seconds between tries: 1, 2, 4, 8, and then 10 for ever."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((1.0, 2.0, 4.0, 8.0), itertools.repeat(10.0))


def connection_info(configuration: Configuration) -> kopf.ConnectionInfo:
    """The official client's login as kopf wants it."""
    hook = configuration.refresh_api_key_hook
    if hook is not None:
        hook(configuration)  # a pod's token is renewed in its file
    scheme, _, token = configuration.api_key.get("BearerToken", "").rpartition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert or None,
        insecure=not configuration.verify_ssl,
        scheme=scheme.capitalize() or None,
        token=token or None,
        certificate_path=configuration.cert_file or None,
        private_key_path=configuration.key_file or None,
    )
