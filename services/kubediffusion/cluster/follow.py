# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A gateway that is told of workflows and nodes by a cluster, for as long as it runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from kubediffusion.cluster.api import Kind
from kubediffusion.cluster.view import Object, View, view
from kubediffusion.cluster.watch import Change, Pace, Server, Watch
from kubediffusion.errors import InvalidWorkflow, KubeDiffusionError
from kubediffusion.gateway.readiness import Readiness
from kubediffusion.workflow import ResolvedWorkflow
from kubediffusion.workflow.revision import decode

WORKFLOWS = Kind("kubediffusion.io/v1alpha1", "diffusionworkflows")
REVISIONS = Kind("apps/v1", "controllerrevisions")
SLICES = Kind("discovery.k8s.io/v1", "endpointslices")
OURS = "app.kubernetes.io/managed-by=kubediffusion"
# What the gateway could not take is told again after so long, and with the next change.
RETRY_SECONDS = 5.0
UNSYNCED = "the cluster's workflows and nodes are not known yet"

log = logging.getLogger(__name__)


class Followed(Protocol):
    """What is told: a `gateway.core.Gateway`."""

    unsynced: str

    def set_workflows(
        self, workflows: Mapping[str, ResolvedWorkflow], draining: Iterable[str]
    ) -> None: ...
    def set_nodes(self, addresses: Sequence[str]) -> None: ...


class Follower:
    """Tells `gateway` what one namespace has. An async context manager.

    Not ready, and its gateway unsynced, until all was seen once. From then on it only ever changes
    by what the API server says: one that is away changes nothing.
    """

    def __init__(
        self,
        api: Server,
        gateway: Followed,
        namespace: str,
        readiness: Readiness,
        pace: Pace | None = None,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.view = View()
        # What the gateway has taken of it.
        self._told = View()
        self._retry_seconds = retry_seconds
        self._gateway = gateway
        self._readiness = readiness
        self._dirty = asyncio.Event()
        self._decoded: dict[str, ResolvedWorkflow] = {}

        def watch(kind: Kind, labels: str = "") -> Watch:
            return Watch(
                api,
                kind,
                namespace=namespace,
                label_selector=labels,
                on_change=self._changed,
                pace=pace,
            )

        self._workflows = watch(WORKFLOWS)
        self._revisions = watch(REVISIONS, OURS)
        self._slices = watch(SLICES, OURS)
        self._watches = (self._workflows, self._revisions, self._slices)
        self._task: asyncio.Task[None] | None = None
        gateway.unsynced = UNSYNCED
        readiness.set(UNSYNCED)

    async def __aenter__(self) -> Follower:
        for watch in self._watches:
            watch.start()
        self._task = asyncio.create_task(self._run(), name="follow the cluster")
        return self

    async def __aexit__(self, *_: object) -> None:
        for watch in self._watches:
            await watch.stop()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @property
    def trouble(self) -> str:
        """Why some of what is served may be old; empty while all is kept up."""
        return "; ".join(watch.trouble for watch in self._watches if watch.trouble)

    def _changed(self, change: Change) -> None:
        self._dirty.set()

    async def _run(self) -> None:
        for watch in self._watches:
            await watch.synced.wait()
        while True:
            pause = None
            try:
                self._apply()
                self._synced()
            except Exception:  # a bug of ours must not end the following
                log.exception("what the cluster says cannot be served; keeping what was")
                pause = self._retry_seconds
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._dirty.wait()

    def _synced(self) -> None:
        if self._gateway.unsynced:
            self._gateway.unsynced = ""
            self._readiness.set("")
            seen = len(self.view.served), len(self.view.addresses)
            log.info("in step with the cluster: %d workflows, %d nodes", *seen)

    def _apply(self) -> None:
        """What there is now becomes what is served."""
        self._dirty.clear()
        before, now = self.view, self._look()
        self.view = now
        for name, why in now.skipped.items():
            if before.skipped.get(name) != why:
                old = now.served.get(name)
                instead = f"serving {old.revision} instead" if old else "not serving it"
                log.warning("workflow %s: %s; %s", name, why, instead)
        if now.addresses != self._told.addresses:
            log.info("nodes: %s", ", ".join(now.addresses) or "none")
            self._gateway.set_nodes(now.addresses)
            self._told = replace(self._told, addresses=now.addresses)
        told = self._told
        if now.served != told.served:
            each = (f"{name} at {served.revision}" for name, served in now.served.items())
            log.info("workflows: %s", ", ".join(each) or "none")
        if (now.served, now.draining) != (told.served, told.draining):
            self._gateway.set_workflows(now.workflows, now.draining)
            self._told = replace(told, served=now.served, draining=now.draining)

    def _look(self) -> View:
        revisions = list(self._revisions.objects.values())
        found = view(
            self._workflows.objects.values(),
            revisions,
            self._slices.objects.values(),
            self._decode,
            self.view,
        )
        uids = {str(each["metadata"].get("uid")) for each in revisions}
        self._decoded = {uid: each for uid, each in self._decoded.items() if uid in uids}
        return found

    def _decode(self, revision: Object) -> ResolvedWorkflow:
        """Once: the data of a ControllerRevision never changes."""
        uid = str(revision["metadata"].get("uid"))
        found = self._decoded.get(uid)
        if found is None:
            try:
                found = self._decoded[uid] = decode(revision.get("data") or {})
            except KubeDiffusionError:
                raise
            except Exception as error:  # whatever somebody has put there
                text = f"it cannot be read: {type(error).__name__}: {error}"
                raise InvalidWorkflow(text) from error
        return found
