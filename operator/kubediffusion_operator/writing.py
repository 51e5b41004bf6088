# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Writes to the API server: server-side apply, with bounded retries, counted.

One `Writer` for each field manager. What the server answers goes into the `Cluster` at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from kubediffusion.cluster.api import APPLY_PATCH, MERGE_PATCH, Api, ApiError, ApiUnreachable, Kind
from kubediffusion.telemetry.metrics import OperatorMetrics
from kubediffusion_operator.cluster import Cluster
from kubediffusion_operator.kinds import BY_KIND, EVENTS
from kubediffusion_operator.planning.types import MANAGER, Object, Ref

ATTEMPTS = 4
PAUSE_FIRST = 0.2
PAUSE_MOST = 5.0
CALL_SECONDS = 15.0
# Too many requests, a timeout, or a server in trouble: the same call may do in a moment.
PASSING = frozenset({408, 429, 500, 502, 503, 504})
NOT_FOUND, CONFLICT = 404, 409

log = logging.getLogger(__name__)


def passes(error: Exception) -> bool:
    """Whether the same call may succeed later, whoever is asked and whatever is sent."""
    if isinstance(error, ApiError):
        return error.status in PASSING
    return isinstance(error, ApiUnreachable)


class Writer:
    """Raises ApiError where the server refuses, ApiUnreachable or ApiError after the last try."""

    def __init__(
        self,
        api: Api,
        cluster: Cluster,
        metrics: OperatorMetrics,
        manager: str = MANAGER,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.manager = manager
        self._api = api
        self._cluster = cluster
        self._metrics = metrics
        self._jitter = jitter

    def as_manager(self, manager: str) -> Writer:
        """The same, under another field manager."""
        return Writer(self._api, self._cluster, self._metrics, manager, self._jitter)

    async def apply(self, wanted: Object, *, status: bool = False) -> Object:
        """All that `manager` owns of an object, or of its status; whoever owned it before."""
        meta = wanted["metadata"]
        kind = BY_KIND[wanted["kind"]]
        path = kind.collection.path(meta["namespace"], meta["name"], "status" if status else "")
        verb = "apply_status" if status else "apply"
        params = {"fieldManager": self.manager, "force": "true"}

        async def call() -> Object:
            return await self._api.request(
                "PATCH",
                path,
                params=params,
                body=wanted,
                content_type=APPLY_PATCH,
                timeout=CALL_SECONDS,
            )

        before = self._cluster.get(kind.kind, meta["namespace"], meta["name"])
        answer = await self._retried(verb, call)
        answer.setdefault("kind", kind.kind)
        if before is None or _version(before) != _version(answer):
            self._metrics.writes.labels(kind.kind, verb).inc()
        self._cluster.wrote(answer)
        return answer

    async def delete(self, namespace: str, ref: Ref) -> bool:
        """That very object, by its uid; False where it was gone, or is another one by now."""
        kind = BY_KIND[ref.kind]
        body: Object = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": ref.uid},
        }

        async def call() -> Object:
            path = kind.collection.path(namespace, ref.name)
            return await self._api.request("DELETE", path, body=body, timeout=CALL_SECONDS)

        try:
            answer = await self._retried("delete", call)
        except ApiError as error:
            if error.status not in (NOT_FOUND, CONFLICT):
                raise
            if error.status == NOT_FOUND:
                self._cluster.deleted(ref.kind, namespace, ref.name, ref.uid)
            return False
        self._metrics.writes.labels(ref.kind, "delete").inc()
        if not (answer.get("metadata") or {}).get("deletionTimestamp"):
            self._cluster.deleted(ref.kind, namespace, ref.name, ref.uid)
        return True

    async def scale(self, namespace: str, name: str, replicas: int) -> None:
        """A DiffusionModel's replicas, by its scale subresource, as HPA and kubectl set them."""
        path = BY_KIND["DiffusionModel"].collection.path(namespace, name, "scale")

        async def call() -> Object:
            return await self._api.request(
                "PATCH",
                path,
                params={"fieldManager": self.manager},
                body={"spec": {"replicas": replicas}},
                content_type=MERGE_PATCH,
                timeout=CALL_SECONDS,
            )

        await self._retried("scale", call)
        self._metrics.writes.labels("DiffusionModel", "scale").inc()

    async def post_event(self, namespace: str, event: Mapping[str, Any]) -> None:
        """An events.k8s.io/v1 Event."""

        async def call() -> Object:
            path = EVENTS.path(namespace)
            return await self._api.request("POST", path, body=dict(event), timeout=CALL_SECONDS)

        await self._retried("event", call)
        self._metrics.writes.labels("Event", "create").inc()

    async def get(self, collection: Kind, namespace: str, name: str) -> Object:
        """Straight from the API server, for what is not watched."""

        async def call() -> Object:
            return await self._api.request("GET", collection.path(namespace, name))

        return await self._retried("get", call)

    async def list(self, collection: Kind, namespace: str) -> list[Object]:
        """Straight from the API server, for what is not watched."""

        async def call() -> Object:
            return await self._api.request("GET", collection.path(namespace))

        return list((await self._retried("list", call)).get("items") or ())

    async def _retried(self, verb: str, call: Callable[[], Awaitable[Object]]) -> Object:
        for attempt in range(ATTEMPTS):
            try:
                return await call()
            except (ApiError, ApiUnreachable) as error:
                code = str(error.status) if isinstance(error, ApiError) else "unreachable"
                self._metrics.api_errors.labels(verb, code).inc()
                if attempt == ATTEMPTS - 1 or not self._again(verb, error):
                    raise
                asked = error.retry_after if isinstance(error, ApiError) else 0.0
                pause = PAUSE_FIRST * 2**attempt * (0.5 + 0.5 * self._jitter())
                await asyncio.sleep(min(max(pause, asked), PAUSE_MOST))
        raise AssertionError("the last attempt returns or raises")

    @staticmethod
    def _again(verb: str, error: Exception) -> bool:
        # With a uid as precondition a conflict means another object; else, that two wrote at once.
        conflict = isinstance(error, ApiError) and error.status == CONFLICT
        return passes(error) or (conflict and verb in ("apply", "apply_status", "scale"))


def _version(found: Mapping[str, Any]) -> str:
    return str(found["metadata"].get("resourceVersion"))
