# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The operator: its parts put together. `frame` runs it as a process."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import socket
import time
from typing import Any

from prometheus_client import CollectorRegistry

from kubediffusion.cluster.api import Api
from kubediffusion.telemetry.metrics import READINESS, MetricsServer, OperatorMetrics, serve_metrics
from kubediffusion_operator.autoscaler import Autoscaler, Prometheus
from kubediffusion_operator.cluster import Cluster
from kubediffusion_operator.events import Recorder
from kubediffusion_operator.flags import Options
from kubediffusion_operator.health import Health, HealthServer, beat_for_ever
from kubediffusion_operator.planning.types import SCALER
from kubediffusion_operator.queueing import Queue
from kubediffusion_operator.reconciling import Reconciler
from kubediffusion_operator.residency import Residency
from kubediffusion_operator.resolver import Resolver
from kubediffusion_operator.writing import Writer

log = logging.getLogger(__name__)


class Operator:
    """All parts, on one event loop: `listen`, then `start`, and `stop`, which may come twice."""

    def __init__(self, options: Options, api: Api) -> None:
        config = options.config
        now = time.monotonic
        self.registry = CollectorRegistry()
        self.metrics = OperatorMetrics(self.registry)
        self._options = options
        self._api = api
        self.cluster = Cluster(self._mark, now=now)
        self.writer = Writer(api, self.cluster, self.metrics)
        self.resolver = Resolver(self._mark, self.metrics)
        self.residency = Residency(self._mark, self.metrics, now=now)
        reporter = os.environ.get("POD_NAME") or socket.gethostname()
        self._recorder = Recorder(self.writer, reporter, now=now)
        scaler = self.writer.as_manager(SCALER)
        self._prometheus = Prometheus.configured(config.prometheus)
        self._autoscaler = Autoscaler(config, self.cluster, scaler, self.metrics, self._prometheus)
        self._reconciler = Reconciler(
            config,
            self.cluster,
            self.writer,
            scaler,
            self._recorder,
            self.resolver,
            self.residency,
            self.metrics,
            now=now,
        )
        self.queue = Queue(self._reconciler.reconcile, debounce=config.debounce_seconds)
        self.metrics.queue_depth.set_function(lambda: self.queue.depth)
        self._health = Health(self.cluster, self.metrics, now=now)
        self._health_server = HealthServer(self._health)
        self._metrics_server: MetricsServer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._planning = False

    async def listen(self) -> None:
        """Serves health and metrics. Raises Unavailable where a port cannot be had."""
        options, config = self._options, self._options.config
        await self._health_server.start(options.host, config.health_port)
        self._metrics_server = serve_metrics(self.registry, options.host, config.metrics_port)
        self._announce()

    def start(self) -> None:
        """Begins to work; an API server that is away is waited for."""
        self._run("heartbeat", beat_for_ever(self._beat))
        namespace = self._options.config.namespace
        for kind, watch in self.cluster.watch(self._api, namespace).items():
            self._run(f"watch of {kind}", watch.run())
        self._run("planning", self._plan_when_synced())
        self._run("autoscaler", self._autoscaler.run())

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self.queue.stop()
        await self.resolver.stop()
        await self.residency.stop()
        await self._recorder.stop()
        await self._health_server.stop()
        if self._metrics_server is not None:
            self._metrics_server.close()
            self._metrics_server = None
        if self._prometheus is not None:
            await self._prometheus.close()
        await self._api.close()

    # ------------------------------------------------------------ what runs

    def _run(self, what: str, part: Any) -> None:
        """A part that runs as long as the process; if it ends by itself, liveness says so."""

        async def run() -> None:
            try:
                await part
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("%s ended", what)
            self._health.died(what)

        self._tasks.append(asyncio.create_task(run(), name=what))

    async def _plan_when_synced(self) -> None:
        # Half a view would be planned as if the rest did not exist.
        await self.cluster.wait_synced()
        # What was imported and listed so far mostly stays: a full collection need not walk it.
        gc.collect()
        gc.freeze()
        self._planning = True
        found = self.cluster.namespaces()
        log.info("all kinds are listed; %d namespaces to look at", len(found))
        for namespace in found:
            self.queue.mark(namespace)
        await asyncio.Event().wait()

    def _mark(self, namespace: str) -> None:
        if self._planning:
            self.queue.mark(namespace)

    def _beat(self) -> None:
        self._health.beat()
        self.cluster.expire()
        self._reconciler.expire()
        for gauge, kind in (
            (self.metrics.workflows, "DiffusionWorkflow"),
            (self.metrics.models, "DiffusionModel"),
        ):
            for state, count in zip(READINESS, self.cluster.readiness(kind), strict=True):
                gauge.labels(state).set(count)

    def _announce(self) -> None:
        assert self._metrics_server is not None, "announced once it is served"
        where = {"health": self._health_server.port, "metrics": self._metrics_server.port}
        log.info("health on port %(health)d, metrics on port %(metrics)d", where)
        path = self._options.announce_path
        if path is not None:
            part = path.with_name(f".{path.name}.part")
            part.write_text(json.dumps({**where, "pid": os.getpid()}))
            part.replace(path)
