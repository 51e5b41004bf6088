# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Workflows looked up in their sources, beside the event loop, and once for each generation."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pydantic import ValidationError

from kubediffusion.api import DiffusionWorkflow
from kubediffusion.errors import KubeDiffusionError, SourceUnavailable
from kubediffusion.resolving import Findings, look_up
from kubediffusion.telemetry.metrics import OperatorMetrics
from kubediffusion.workflow import PipelineIndex
from kubediffusion_operator.planning.types import Object, Resolution, ResolutionError

Generation = tuple[str, int]  # uid and metadata.generation of a workflow

# A source that does not answer is asked again after 5, 10, 20, ... seconds, 5 minutes at most.
RETRY_FIRST = 5.0
RETRY_MOST = 300.0
# A source that says no will say so again, until somebody puts it right.
LASTING = frozenset({"SourceNotFound", "RevisionNotFound", "Unauthorized", "Offline"})
RETRY_LASTING = 120.0
THREADS = 4

log = logging.getLogger(__name__)


@dataclass
class _Entry:
    """A look-up under way (`task`), or done (`result`)."""

    namespace: str
    result: Resolution | ResolutionError | None = None
    task: asyncio.Task[None] | None = None
    alarm: asyncio.TimerHandle | None = None
    failures: int = 0


class Resolver:
    """`on_result` gets the namespace of each result, and of each error that is due once more."""

    def __init__(
        self,
        on_result: Callable[[str], None],
        metrics: OperatorMetrics,
        look: Callable[[DiffusionWorkflow], Findings] = look_up,
    ) -> None:
        self._on_result = on_result
        self._metrics = metrics
        self._look = look
        self._entries: dict[Generation, _Entry] = {}
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="resolve")

    def results(self, namespace: str) -> Mapping[Generation, Resolution | ResolutionError]:
        return {
            key: entry.result
            for key, entry in self._entries.items()
            if entry.namespace == namespace and entry.result is not None
        }

    def want(self, namespace: str, workflow: Object) -> None:
        """Looks it up, unless that is under way or its last result is not due once more."""
        key = _generation(workflow)
        entry = self._entries.setdefault(key, _Entry(namespace))
        if entry.task is not None:
            return
        if isinstance(entry.result, Resolution):
            return
        if isinstance(entry.result, ResolutionError) and not entry.result.due:
            return
        entry.task = asyncio.create_task(
            self._resolve(key, entry, workflow), name=f"resolve {workflow['metadata']['name']}"
        )

    def keep_only(self, namespace: str, workflows: Mapping[str, Object]) -> None:
        """Forgets what is of no generation that is there."""
        wanted = {_generation(workflow) for workflow in workflows.values()}
        for key, entry in list(self._entries.items()):
            if entry.namespace == namespace and key not in wanted:
                del self._entries[key]
                if entry.alarm is not None:
                    entry.alarm.cancel()
                if entry.task is not None:
                    entry.task.cancel()

    async def stop(self) -> None:
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        for entry in self._entries.values():
            if entry.alarm is not None:
                entry.alarm.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A thread that waits for a network ends with the process.
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _resolve(self, key: Generation, entry: _Entry, workflow: Object) -> None:
        loop = asyncio.get_running_loop()
        try:
            entry.result = await loop.run_in_executor(self._threads, self._look_up, workflow)
        except Exception as error:
            entry.failures += 1
            entry.result = _error(error)
            pause = _pause(error, entry.failures)
            entry.alarm = loop.call_later(pause, self._due, key)
            self._metrics.resolutions.labels("error").inc()
            if not isinstance(error, KubeDiffusionError):
                log.exception("looking up %s", workflow["metadata"]["name"])
        else:
            self._metrics.resolutions.labels("ok").inc()
        finally:
            entry.task = None
        self._on_result(entry.namespace)

    def _due(self, key: Generation) -> None:
        entry = self._entries.get(key)
        if entry is not None and isinstance(entry.result, ResolutionError):
            entry.alarm = None
            entry.result = replace(entry.result, due=True)
            self._on_result(entry.namespace)

    def _look_up(self, workflow: Object) -> Resolution:
        findings = self._look(_definition(workflow))
        index = PipelineIndex(dict(findings.index.components), findings.index.commit)
        return Resolution(index, dict(findings.commits))


def _definition(workflow: Object) -> DiffusionWorkflow:
    content = {
        "apiVersion": workflow["apiVersion"],
        "kind": workflow["kind"],
        "metadata": {"name": workflow["metadata"]["name"]},
        "spec": workflow["spec"],
    }
    return DiffusionWorkflow.model_validate_json(json.dumps(content))


def _generation(workflow: Object) -> Generation:
    meta = workflow["metadata"]
    return str(meta["uid"]), int(meta.get("generation") or 0)


def _error(error: Exception) -> ResolutionError:
    if isinstance(error, KubeDiffusionError):
        return ResolutionError(error.reason, error.message, error.field)
    if isinstance(error, ValidationError):
        return ResolutionError("InvalidWorkflow", str(error))
    return ResolutionError("Internal", f"{type(error).__name__}: {error}; see the operator's log")


def _pause(error: Exception, failures: int) -> float:
    if isinstance(error, SourceUnavailable) and error.reason not in LASTING:
        return min(RETRY_FIRST * 2 ** min(failures - 1, 16), RETRY_MOST)
    return RETRY_LASTING
