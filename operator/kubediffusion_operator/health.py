# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Whether the operator is alive and ready, for Kubernetes' probes, and the beat behind it."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable

from aiohttp import web

from kubediffusion.errors import Unavailable
from kubediffusion.telemetry.metrics import OperatorMetrics
from kubediffusion_operator.cluster import Cluster

BEAT_SECONDS = 1.0
# A loop that has not done its round for so long is stuck.
STUCK_SECONDS = 30.0
# A watch that has been in trouble for so long is not getting better: a new process may.
STALE_SECONDS = 300.0

log = logging.getLogger(__name__)


class Health:
    """`beat` is called about once a second; without it the operator counts as stuck."""

    def __init__(
        self, cluster: Cluster, metrics: OperatorMetrics, *, now: Callable[[], float]
    ) -> None:
        self._cluster = cluster
        self._metrics = metrics
        self._now = now
        self._last = now()
        self._troubled: dict[str, float] = {}
        self._dead: set[str] = set()
        # Read by the thread that serves the metrics, while the loop may be stuck.
        metrics.heartbeat_age_seconds.set_function(lambda: now() - self._last)

    def beat(self) -> None:
        self._last = now = self._now()
        for kind, watch in self._cluster.watches.items():
            self._metrics.watch_trouble.labels(kind).set(bool(watch.trouble))
            if watch.trouble:
                self._troubled.setdefault(kind, now)
            else:
                self._troubled.pop(kind, None)

    def died(self, what: str) -> None:
        """A part that ought to run for ever has ended."""
        self._dead.add(what)

    @property
    def problems(self) -> list[str]:
        """Why a new process is needed; empty while all is well."""
        now = self._now()
        found = [f"{what} has ended" for what in sorted(self._dead)]
        if now - self._last > STUCK_SECONDS:
            found.append(f"no heartbeat for {now - self._last:.0f} s")
        for kind, since in self._troubled.items():
            if now - since > STALE_SECONDS:
                why = self._cluster.watches[kind].trouble
                found.append(f"{kind} not watched for {now - since:.0f} s: {why}")
        return found

    @property
    def missing(self) -> list[str]:
        """The kinds that have not been listed once: until then nothing is planned."""
        watches = self._cluster.watches
        if not watches:
            return ["everything"]
        return [kind for kind, watch in watches.items() if not watch.synced.is_set()]


class HealthServer:
    """/healthz and /readyz: 200 or 503, with the reasons as text."""

    def __init__(self, health: Health) -> None:
        self._health = health
        application = web.Application()
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        self._runner = web.AppRunner(application, access_log=None)
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Port 0 takes a free one. Raises Unavailable, reason PortInUse."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise Unavailable(
                f"cannot serve health on {host}:{port}: {error.strerror or error}; choose another "
                "port, or 0 for a free one",
                field="health_port",
                reason="PortInUse" if error.errno == errno.EADDRINUSE else "AddressUnavailable",
            ) from error
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return _answer(self._health.problems)

    async def _readyz(self, _: web.Request) -> web.Response:
        return _answer([f"{kind} not listed yet" for kind in self._health.missing])


def _answer(problems: list[str]) -> web.Response:
    if not problems:
        return web.Response(text="ok\n")
    return web.Response(status=503, text="\n".join(problems) + "\n")


async def beat_for_ever(beat: Callable[[], None]) -> None:
    while True:
        try:
            beat()
        except Exception:
            log.exception("the heartbeat's round failed")
        await asyncio.sleep(BEAT_SECONDS)
