# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The autoscaler's loop: read Prometheus, decide each namespace, write what is different.

What it remembers can be lost: a fresh process takes the replicas that are there for right until a
window has passed, and knows from the models' own status what was done before.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import TypeAlias

from kubediffusion.cluster.api import ApiError, Kind
from kubediffusion.errors import KubeDiffusionError
from kubediffusion.scaling import Decision, MetricState, ModelCase, Namespace, decide_all
from kubediffusion.telemetry.metrics import OperatorMetrics
from kubediffusion_operator.autoscaler.memory import Memory, ModelMemory
from kubediffusion_operator.autoscaler.observe import NamespaceObjects, Scaled, View, observe
from kubediffusion_operator.autoscaler.prometheus import Prometheus, PrometheusUnavailable
from kubediffusion_operator.autoscaler.reading import Reading, read
from kubediffusion_operator.autoscaler.status import (
    Said,
    entry,
    history_of,
    of_left,
    wanted_status,
)
from kubediffusion_operator.cluster import Cluster
from kubediffusion_operator.config import OperatorConfig
from kubediffusion_operator.planning.names import name_of, uid_of
from kubediffusion_operator.planning.types import API_VERSION, Object
from kubediffusion_operator.writing import NOT_FOUND, Writer

log = logging.getLogger(__name__)

QUOTAS = Kind("v1", "resourcequotas")
# Quotas change rarely, so they are asked for now and then instead of watched.
QUOTA_SECONDS = 30.0
# Of one round, with all its writes and their retries.
ROUND_SECONDS = 30.0
WRITES_AT_ONCE = 8

# What is to be written about one model; false where that failed.
Write: TypeAlias = "Callable[[], Awaitable[bool]]"


class Autoscaler:
    """`writer` is of the field manager kubediffusion-autoscaler; `now` is wall time in seconds.

    Without a `prometheus` every demand is unknown, and the conditions say so.
    """

    def __init__(
        self,
        config: OperatorConfig,
        cluster: Cluster,
        writer: Writer,
        metrics: OperatorMetrics,
        prometheus: Prometheus | None,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._writer = writer
        self._metrics = metrics
        self._prometheus = prometheus
        self._now = now
        self._memories: dict[str, Memory] = {}
        self._quotas: dict[str, tuple[float, list[Object]]] = {}
        self._problem = ""

    async def run(self) -> None:
        """For ever, once the cluster's objects are known. Never raises but when cancelled."""
        await self._cluster.wait_synced()
        clock = asyncio.get_running_loop().time
        while True:
            begin = clock()
            await self.round()
            await asyncio.sleep(max(0.0, self._config.scaling.interval_seconds - clock() + begin))

    async def round(self) -> None:
        """One look at everything, and what follows from it. Bounded in time; raises nothing."""
        begin, outcome = time.monotonic(), "error"
        try:
            async with asyncio.timeout(ROUND_SECONDS):
                outcome = "ok" if await self._round() else "error"
        except TimeoutError:
            log.warning("a round took longer than %g s and was cut off", ROUND_SECONDS)
        except Exception:  # whatever it is, the next round may do
            log.exception("a round failed")
        self._metrics.autoscale_seconds.labels(outcome).observe(time.monotonic() - begin)

    async def _round(self) -> bool:
        """Whether all went well."""
        reading = await self._read()
        spaces = [n for n in sorted(self._cluster.namespaces()) if self._cluster.models(n)]
        self._memories = {n: m for n, m in self._memories.items() if n in spaces}
        writes: list[Write] = []
        states: Counter[MetricState] = Counter()
        for namespace in spaces:
            found = await self._objects(namespace)
            try:
                view = observe(found, reading, self._config)
                writes += self._decide(namespace, view)
            except Exception:  # one namespace's trouble is not another's
                log.exception("namespace %s cannot be decided", namespace)
                continue
            states.update(model.observation.metrics.state for model in view.scaled.values())
        for state in MetricState:
            self._metrics.autoscaled_models.labels(state.value.lower()).set(states[state])
        return all(await _some_at_once(writes))

    # ------------------------------------------------------------ looking

    async def _read(self) -> Reading | PrometheusUnavailable:
        if self._prometheus is None:
            return PrometheusUnavailable(
                "the operator is configured without a Prometheus: set prometheus.url",
                reason="NoPrometheus",
            )
        try:
            reading = await read(self._prometheus, self._config.prometheus.stale_seconds)
        except PrometheusUnavailable as error:
            if error.message != self._problem:
                log.warning("%s; replicas stay as they are", error.message)
            self._problem = error.message
            return error
        if self._problem:
            log.info("Prometheus answers again")
        self._problem = ""
        return reading

    async def _objects(self, namespace: str) -> NamespaceObjects:
        cluster = self._cluster
        quotas = await self._quotas_of(namespace)
        return NamespaceObjects(
            namespace,
            models=dict(cluster.models(namespace)),
            deployments=dict(cluster.deployments(namespace)),
            pods=dict(cluster.pods(namespace)),
            pools=dict(cluster.pools(namespace)),
            quotas=quotas,
        )

    async def _quotas_of(self, namespace: str) -> Sequence[Object]:
        """The last known ones where the API server does not tell: it keeps them itself."""
        asked, known = self._quotas.get(namespace, (float("-inf"), []))
        if self._now() - asked < QUOTA_SECONDS:
            return known
        try:
            known = await self._writer.list(QUOTAS, namespace)
        except KubeDiffusionError as error:
            log.warning("the ResourceQuotas of namespace %s: %s", namespace, error)
        self._quotas[namespace] = (self._now(), known)
        return known

    # ------------------------------------------------------------ deciding

    def _decide(self, namespace: str, view: View) -> Iterable[Write]:
        memory = self._memories.setdefault(namespace, Memory())
        memory.keep_only(view.scaled.values())
        now = self._now()
        known = {name: memory.of(model, now) for name, model in view.scaled.items()}
        cases = {
            name: ModelCase(
                model.observation,
                model.limits,
                known[name].history,
                gpus=model.gpus,
                live=model.live,
                ending=model.ending,
            )
            for name, model in view.scaled.items()
        }
        done = decide_all(Namespace(cases, view.workflows, view.budget), memory.book, now)
        memory.book = done.book
        for name, history in done.histories.items():
            known[name].history = history
            decision = done.decisions[name]
            model = view.scaled[name]
            yield partial(self._carry_out, namespace, model, decision, known[name], now)
        for left in view.left.values():
            said = Said(of_left(left.reason, left.why), history_of(left.object))
            yield partial(self._say, namespace, left.object, said, now)

    # ------------------------------------------------------------ writing

    async def _carry_out(
        self, namespace: str, model: Scaled, decision: Decision, memory: ModelMemory, now: float
    ) -> bool:
        name, before = name_of(model.object), model.observation.current
        conditions = memory.conditions(model, decision, now)
        if decision.replicas != before:
            scale = self._writer.scale(namespace, name, decision.replicas)
            if not await self._try(scale, namespace, name):
                return False
            memory.scaled(now, decision.replicas - before, entry(decision, before, now))
            self._metrics.scalings.labels(decision.reason.value).inc()
            log.info(
                "%s/%s: %d -> %d replicas, %s: %s",
                namespace,
                name,
                before,
                decision.replicas,
                decision.reason.value,
                decision.message,
            )
        return await self._say(namespace, model.object, Said(conditions, memory.decisions), now)

    async def _say(self, namespace: str, model: Object, said: Said, now: float) -> bool:
        status = wanted_status(model, said, now)
        if status is None:
            return True
        name = name_of(model)
        wanted: Object = {
            "apiVersion": API_VERSION,
            "kind": "DiffusionModel",
            # Of this very object, not of another one that got its name meanwhile.
            "metadata": {"name": name, "namespace": namespace, "uid": uid_of(model)},
            "status": status,
        }
        return await self._try(self._writer.apply(wanted, status=True), namespace, name)

    async def _try(self, write: Awaitable[object], namespace: str, name: str) -> bool:
        try:
            await write
        except KubeDiffusionError as error:
            if not (isinstance(error, ApiError) and error.status == NOT_FOUND):  # it just went
                log.warning("%s/%s: %s; again in the next round", namespace, name, error)
            return False
        return True


async def _some_at_once(writes: Iterable[Write]) -> list[bool]:
    slots = asyncio.Semaphore(WRITES_AT_ONCE)

    async def one(write: Write) -> bool:
        async with slots:
            return await write()

    return await asyncio.gather(*(one(write) for write in writes))
