# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How busy the node is, in load reports and metrics; and of each task, when it ended, a span."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from threading import Event, get_ident
from typing import TYPE_CHECKING

from kubediffusion.node.device import Device
from kubediffusion.node.residency import Residency
from kubediffusion.node.tasks import Resident, Task
from kubediffusion.telemetry.metrics import Children, NodeMetrics
from kubediffusion.telemetry.tracing import configure as configure_tracing
from kubediffusion.tensors import TensorStore
from kubediffusion.v1alpha1 import node_pb2

if TYPE_CHECKING:
    from kubediffusion.node.core import Node

SOONEST = 0.1
LATEST = 1.0
# A scrape does not wait longer for a loop that is busy; it gets the numbers of the last one.
SCRAPE_SECONDS = 1.0


class Reporter:
    """Reports on change, at most every 100 ms, and once a second."""

    def __init__(
        self,
        node: Node,
        store: TensorStore,
        device: Device,
        residency: Residency,
        metrics: NodeMetrics,
        now: Callable[[], float],
    ) -> None:
        self._node = node
        self._store = store
        self._device = device
        self._residency = residency
        self._metrics = metrics
        self._child = Children()
        self._now = now
        self._tracing = configure_tracing("kubediffusion-node")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._timer: asyncio.TimerHandle | None = None
        self._soon = False
        self._last = -LATEST
        metrics.on_scrape(self._refresh)
        self._counted: set[tuple[str, str]] = set()

    def changed(self) -> None:
        """Cheap: called with every task's beginning and end."""
        if not self._soon and self._timer is not None:
            self._timer.cancel()
            self._soon = True
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(0.0, self._last + SOONEST - loop.time()), self.now)

    def now(self) -> None:
        """Sends a report and sets the clock for the next. The first call starts it."""
        if self._timer is not None:
            self._timer.cancel()
        loop = self._loop = asyncio.get_running_loop()
        self._thread = get_ident()
        self._last = loop.time()
        self._soon = False
        self._timer = loop.call_later(LATEST, self.now)
        report = self.load()
        event = node_pb2.WorkEvent(load=report)
        for session in self._node.sessions.values():
            session.outbox.replace(("load",), event)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # A collector may take long to answer. The process waits for this thread, nothing else does.
        threading.Thread(target=self._tracing.close, name="last spans").start()

    def load(self) -> node_pb2.LoadReport:
        """Every task that is here and has not the device waits."""
        running = [task for task in self._device.running if not task.ended]
        tasks = self._node.tasks.values()
        stats = self._store.stats()
        return node_pb2.LoadReport(
            queued=len(tasks) - len(running),
            running=len(running),
            queued_seconds=sum(task.remaining_seconds() for task in tasks),
            memory_used=self._residency.memory_used,
            memory_limit=self._residency.memory_limit,
            draining=self._node.draining,
            resident=self._residency.ready,
            tensor_bytes=stats.nbytes,
            tensors=stats.tensors,
            residency_generation=self._residency.generation,
            gateways=len(self._node.sessions),
            helping=len(self._node.helpers),
        )

    def observe(self, task: Task, outcome: str, error: str = "") -> None:
        """A task ended."""
        metrics, child, labels = self._metrics, self._child, task.labels
        timing = task.timing()
        child(metrics.tasks, *labels, outcome).inc()
        self.count_steps(task)
        if task.steps_helped:
            child(metrics.helper_wait_seconds, task.model).observe(task.helper_wait_seconds)
        spent: dict[str, float] = {}
        if task.started is not None:
            child(metrics.task_queue_seconds, *labels).observe(timing.queue_seconds)
            child(metrics.task_fetch_seconds, *labels).observe(timing.fetch_seconds)
            child(metrics.task_run_seconds, *labels).observe(timing.run_seconds)
            spent = {
                "queue_seconds": timing.queue_seconds,
                "fetch_seconds": timing.fetch_seconds,
                "run_seconds": timing.run_seconds,
            }
        self._tracing.record(
            task.stage,
            task.assign.traceparent,
            self._now() - task.arrival,
            error,
            request_id=task.name[0],
            task=task.name[1],
            epoch=task.key.epoch,
            model=task.model,
            outcome=outcome,
            steps=timing.steps_run,
            **spent,
        )

    def count_steps(self, task: Task) -> None:
        """Those that were done since the last time."""
        new = task.steps_run - task.counted
        if new > 0:
            task.counted += new
            self._child(self._metrics.denoise_steps, task.model).inc(new)

    def count_measures(self, resident: Resident) -> None:
        """What a model has counted of itself since the last time: also before it goes."""
        if resident.measured is None:
            return
        metrics, model = self._metrics, resident.identity
        before, now = resident.counted, resident.measured.measures
        resident.counted = now
        seen, kept = now.tokens_seen - before.tokens_seen, now.tokens_kept - before.tokens_kept
        if seen:
            self._child(metrics.image_tokens, model, "kept").inc(kept)
            self._child(metrics.image_tokens, model, "skipped").inc(seen - kept)
        if now.steps_reused > before.steps_reused:
            self._child(metrics.steps_reused, model).inc(now.steps_reused - before.steps_reused)
        if now.graphs:
            metrics.compiled_graphs.labels(model).set(now.graphs)
        spent = now.compile_seconds - before.compile_seconds
        if spent:
            self._child(metrics.compile_seconds, model).inc(spent)

    def _refresh(self) -> None:
        """The gauges are set when somebody looks, from the loop's thread as all that they tell."""
        loop = self._loop
        if loop is None or loop.is_closed() or get_ident() == self._thread:
            self._publish()
            return
        done = Event()

        def publish() -> None:
            try:
                self._publish()
            finally:
                done.set()

        with contextlib.suppress(RuntimeError):  # closed since
            loop.call_soon_threadsafe(publish)
            done.wait(SCRAPE_SECONDS)

    def _publish(self) -> None:
        metrics, report = self._metrics, self.load()
        running = Counter(task.labels for task in self._device.running if not task.ended)
        present = Counter(task.labels for task in self._node.tasks.values())
        known = self._residency.known_stages()
        for labels in known | set(present) | self._counted:
            metrics.tasks_queued.labels(*labels).set(present[labels] - running[labels])
            metrics.tasks_running.labels(*labels).set(running[labels])
        self._counted = set(present)
        for resident in self._residency.measured():
            self.count_measures(resident)
        metrics.tensors.set(report.tensors)
        metrics.tensor_bytes.set(report.tensor_bytes)
        metrics.tensor_held_bytes.set(self._store.stats().held_bytes)
        metrics.memory_limit_bytes.set(report.memory_limit)
        metrics.residency_generation.set(report.residency_generation)
