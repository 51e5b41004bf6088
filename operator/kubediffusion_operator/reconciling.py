# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One namespace at a time: look at all of it, plan it (pure), write what the plan says."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from kubediffusion.cluster.api import ApiError
from kubediffusion.errors import KubeDiffusionError
from kubediffusion.telemetry.metrics import OperatorMetrics
from kubediffusion_operator.cluster import Cluster
from kubediffusion_operator.config import OperatorConfig
from kubediffusion_operator.events import Recorder
from kubediffusion_operator.holding import Holds, digest
from kubediffusion_operator.kinds import BY_KIND, WATCHED
from kubediffusion_operator.planning.cache import PlanCache
from kubediffusion_operator.planning.plan import plan
from kubediffusion_operator.planning.types import (
    API_VERSION,
    EventRecord,
    Object,
    Observed,
    Plan,
    PlanningError,
    Ref,
    ScaleWrite,
)
from kubediffusion_operator.residency import Residency
from kubediffusion_operator.resolver import Resolver
from kubediffusion_operator.writing import NOT_FOUND, Writer, passes

# Writes to the API server at the same time, of one namespace.
WRITES_AT_ONCE = 8
UNAUTHORIZED = 401

log = logging.getLogger(__name__)


@dataclass
class _Round:
    """What came of carrying out one plan."""

    namespace: str
    # Objects that are now different.
    written: int = 0
    # The first trouble that will pass by itself: the namespace is tried again.
    trouble: KubeDiffusionError | None = None
    # Seconds after which a write that rests may go.
    rest: float | None = None
    # What the API server refuses for good, by (kind, name): its words.
    refused: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])

    def rest_at_most(self, seconds: float | None) -> None:
        if seconds is not None:
            self.rest = seconds if self.rest is None else min(self.rest, seconds)


@dataclass(frozen=True)
class _Write:
    """One write: `before` is the object's version when it was planned, "" where there is none."""

    what: str
    name: str
    digest: str
    before: str

    @property
    def on_existing(self) -> bool:
        return "/" in self.what


class Reconciler:
    def __init__(
        self,
        config: OperatorConfig,
        cluster: Cluster,
        writer: Writer,
        scaler: Writer,
        recorder: Recorder,
        resolver: Resolver,
        residency: Residency,
        metrics: OperatorMetrics,
        *,
        now: Callable[[], float],
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
        plan: Callable[[Observed, PlanCache], Plan] = plan,
    ) -> None:
        self._config = config
        self._cluster = cluster
        self._writer = writer
        self._scaler = scaler
        self._recorder = recorder
        self._resolver = resolver
        self._residency = residency
        self._metrics = metrics
        self._now = now
        self._wall = wall
        self._plan = plan
        self._holds = Holds()
        self._caches: dict[str, PlanCache] = {}
        self._refused: dict[str, Mapping[tuple[str, str], str]] = {}
        self._errors: dict[str, frozenset[PlanningError]] = {}

    async def reconcile(self, namespace: str) -> float | None:
        """Seconds after which to come back; None: when something happens.

        Raises KubeDiffusionError where the API server is in trouble, after all has been tried.
        """
        begin, outcome = self._now(), "error"
        try:
            again = await self._reconcile(namespace)
            outcome = "ok"
        finally:
            self._metrics.reconcile_seconds.labels(outcome).observe(self._now() - begin)
        return again

    async def _reconcile(self, namespace: str) -> float | None:
        observed = self._observe(namespace)
        self._resolver.keep_only(namespace, observed.workflows)
        self._residency.keep_only(
            namespace, (pod["metadata"]["uid"] for pod in observed.pods.values())
        )
        if namespace not in self._cluster.namespaces():
            self._forget(namespace)
            return None
        cache = self._caches.setdefault(namespace, PlanCache())
        with self._metrics.plan_seconds.time():
            # In a thread: a namespace of hundreds of workflows takes long enough to miss a probe.
            wanted = await asyncio.to_thread(self._plan, observed, cache)
        self._tell_errors(namespace, wanted)
        done = await self._carry_out(observed, wanted)
        self._refused[namespace] = done.refused
        if done.trouble is not None:
            raise done.trouble
        if done.written or done.refused != observed.refused:
            return 0.0  # what was written may ask for more: until a plan is empty
        done.rest_at_most(wanted.requeue_after)
        return done.rest

    def _tell_errors(self, namespace: str, wanted: Plan) -> None:
        """What planning did not understand: once, until it is another error."""
        known = self._errors.pop(namespace, frozenset())
        for error in wanted.errors:
            if error not in known:
                named = error.about.kind, namespace, error.about.name
                log.error("planning %s %s/%s failed\n%s", *named, error.traceback)
        if wanted.errors:
            self._errors[namespace] = frozenset(wanted.errors)

    def _observe(self, namespace: str) -> Observed:
        def copy(kind: str) -> dict[str, Object]:
            return dict(self._cluster.objects(kind, namespace))

        now = self._wall().replace(microsecond=0)
        objects: dict[str, Any] = {each.name: copy(each.kind) for each in WATCHED}
        return Observed(
            namespace=namespace,
            now=now.isoformat().replace("+00:00", "Z"),
            config=self._config,
            resolutions=self._resolver.results(namespace),
            residency=self._residency.reports(namespace),
            refused=self._refused.get(namespace, {}),
            **objects,
        )

    def _forget(self, namespace: str) -> None:
        self._caches.pop(namespace, None)
        self._refused.pop(namespace, None)
        self._errors.pop(namespace, None)
        self._holds.forget(namespace)

    def expire(self) -> None:
        """To be called now and then."""
        self._holds.expire(self._now())

    # ------------------------------------------------------------ carrying out

    async def _carry_out(self, observed: Observed, wanted: Plan) -> _Round:
        done = _Round(observed.namespace)
        # In the plan's order; objects of one kind do not depend on each other.
        for _, same in itertools.groupby(wanted.apply, key=lambda each: each["kind"]):
            await self._all(self._apply(done, each) for each in same)
        await self._all(self._delete(done, each) for each in wanted.delete)
        await self._all(self._scale(done, each) for each in wanted.scale)
        await self._all(
            self._apply_status(done, kind, name, status)
            for (kind, name), status in wanted.status.items()
        )
        for event in wanted.events:
            self._recorder.record(observed.namespace, event)
        self._residency.send(observed.namespace, [*wanted.residency, *wanted.looks])
        for workflow in wanted.resolve:
            self._resolver.want(observed.namespace, workflow)
        if wanted.writes:
            log.debug(
                "namespace %s: %d writes wanted, %d made",
                observed.namespace,
                wanted.writes,
                done.written,
            )
        return done

    async def _all(self, writes: Iterable[Awaitable[None]]) -> None:
        slots = asyncio.Semaphore(WRITES_AT_ONCE)

        async def one(write: Awaitable[None]) -> None:
            async with slots:
                await write

        await asyncio.gather(*(one(write) for write in writes))

    async def _apply(self, done: _Round, wanted: Object) -> None:
        kind, name = wanted["kind"], wanted["metadata"]["name"]
        wanted = {**wanted, "metadata": {**wanted["metadata"], "namespace": done.namespace}}

        async def call() -> str:
            return _version(await self._writer.apply(wanted))

        write = _Write(kind, name, digest(wanted), self._version(kind, done.namespace, name))
        await self._try(done, write, _user_sees(wanted), call)

    async def _apply_status(self, done: _Round, kind: str, name: str, status: Object) -> None:
        known = self._cluster.get(kind, done.namespace, name)
        if known is None:
            return  # it went meanwhile; the next plan knows
        uid = known["metadata"]["uid"]
        wanted: Object = {
            "apiVersion": API_VERSION,
            "kind": kind,
            # Of this very object, not of another one that got its name meanwhile.
            "metadata": {"name": name, "namespace": done.namespace, "uid": uid},
            "status": status,
        }

        async def call() -> str:
            return _version(await self._writer.apply(wanted, status=True))

        write = _Write(f"{kind}/status", name, digest(wanted), _version(known))
        await self._try(done, write, Ref(API_VERSION, kind, name, uid), call)

    async def _delete(self, done: _Round, ref: Ref) -> None:
        async def call() -> str:
            await self._writer.delete(done.namespace, ref)
            return ""

        before = self._version(ref.kind, done.namespace, ref.name)
        write = _Write(f"{ref.kind}/delete", ref.name, ref.uid, before or "gone")
        await self._try(done, write, ref, call)

    async def _scale(self, done: _Round, wanted: ScaleWrite) -> None:
        async def call() -> str:
            await self._scaler.scale(done.namespace, wanted.name, wanted.replicas)
            return ""

        ref = Ref(API_VERSION, "DiffusionModel", wanted.name, wanted.uid)
        before = self._version(ref.kind, done.namespace, ref.name)
        write = _Write("DiffusionModel/scale", ref.name, str(wanted.replicas), before)
        await self._try(done, write, ref, call)

    async def _try(
        self, done: _Round, write: _Write, about: Ref, call: Callable[[], Awaitable[str]]
    ) -> None:
        """`call` returns the object's version after the write, "" where the object is another."""
        key = (done.namespace, write.what, write.name)
        wait = self._holds.wait(key, write.digest, write.before, self._now())
        if wait:
            done.rest_at_most(wait)
            self._still_refused(done, write)
            return
        try:
            after = await call()
        except KubeDiffusionError as error:
            if write.on_existing and isinstance(error, ApiError) and error.status == NOT_FOUND:
                return  # it went meanwhile; a watch will tell
            self._failed(done, write, about, error)
            return
        if not self._holds.wrote(key, write.digest, write.before, after, self._now()):
            done.written += 1
            return
        done.rest_at_most(self._holds.wait(key, write.digest, after, self._now()))
        log.warning("%s %s/%s: the API server does not keep what is written", *_named(key))

    def _failed(self, done: _Round, write: _Write, about: Ref, error: KubeDiffusionError) -> None:
        lost_token = isinstance(error, ApiError) and error.status == UNAUTHORIZED
        if passes(error) or lost_token or not isinstance(error, ApiError):
            done.trouble = done.trouble or error
            return
        key = (done.namespace, write.what, write.name)
        self._holds.refused(key, write.digest, self._now())
        done.rest_at_most(self._holds.wait(key, write.digest, write.before, self._now()))
        log.warning("%s %s/%s is refused: %s", *_named(key), error)
        if write.on_existing:
            message = f"the API server refuses {write.what} {write.name}: {error.message}"
            event = EventRecord(about, "Warning", "WriteRefused", message)
            self._recorder.record(done.namespace, event)
        else:
            # The plan tells it, where the user looks.
            done.refused[write.what, write.name] = error.message

    def _still_refused(self, done: _Round, write: _Write) -> None:
        """A write that rests because it was refused is as good as refused once more."""
        words = self._refused.get(done.namespace, {}).get((write.what, write.name))
        if words is not None:
            done.refused[write.what, write.name] = words

    def _version(self, kind: str, namespace: str, name: str) -> str:
        known = self._cluster.get(kind, namespace, name)
        return _version(known) if known else ""


def _version(found: Object) -> str:
    return str(found["metadata"].get("resourceVersion"))


def _named(key: tuple[str, str, str]) -> tuple[str, str, str]:
    namespace, what, name = key
    return what, namespace, name


def _user_sees(wanted: Object) -> Ref:
    """The object to tell about: of a child its owner."""
    meta = wanted["metadata"]
    owners = meta.get("ownerReferences") or ()
    owner = next((o for o in owners if o.get("controller")), owners[0] if owners else None)
    if owner is None or BY_KIND[wanted["kind"]].collection.api_version == API_VERSION:
        return Ref(wanted["apiVersion"], wanted["kind"], meta["name"], str(meta.get("uid", "")))
    return Ref(owner["apiVersion"], owner["kind"], owner["name"], owner["uid"])
