# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A gateway's numbers as metrics. What happens is counted as it does; what is, twice a second."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kubediffusion.errors import KubeDiffusionError, Overloaded
from kubediffusion.gateway.plan import HELPER_STAGE
from kubediffusion.telemetry.metrics import GATEWAY_STATES, Children, GatewayMetrics, Registry
from kubediffusion.v1alpha1 import gateway_pb2
from kubediffusion.workflow.colocation import is_helper

if TYPE_CHECKING:
    from kubediffusion.gateway.attempts import TaskRun
    from kubediffusion.gateway.coordinator import ImageRun
    from kubediffusion.gateway.core import Gateway
    from kubediffusion.gateway.flights import Flight
    from kubediffusion.gateway.plan import PlannedTask
    from kubediffusion.workflow import ResolvedWorkflow

PERIOD = 0.5


class Measures:
    def __init__(self, gateway: Gateway) -> None:
        self.registry = Registry()
        self.metrics = GatewayMetrics(self.registry)
        self._gateway = gateway
        self._child = Children()
        self._timer: asyncio.TimerHandle | None = None
        self._workflows: set[str] = set()
        self._models: set[tuple[str, str]] = set()

    def start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(PERIOD, self.start)
        self.refresh()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    # ------------------------------------------------------------ what happens

    def ended(self, flight: Flight, seconds: float) -> None:
        workflow = self._label(flight.request.workflow)
        error, metrics = flight.error, self.metrics
        outcome = "cancelled" if error is None else _outcome(error)
        if flight.succeeded:
            outcome = "succeeded"
            self._child(metrics.images, workflow).inc(len(flight.runs))
            for run in flight.runs:
                self._stages(workflow, run)
        self._child(metrics.requests, workflow, outcome).inc()
        self._child(metrics.request_seconds, workflow, outcome).observe(seconds)

    def shed(self, workflow: str, error: Overloaded, tasks: Sequence[PlannedTask]) -> None:
        """`tasks` of all images that were not taken: what was shed is demand too."""
        self.metrics.shed.labels(workflow, error.reason).inc()
        for task in tasks:
            seconds = self._gateway.profiles.run_seconds(task.model, task.stage, "", task.units)
            self.metrics.shed_task_seconds.labels(task.model, task.stage).inc(seconds)
            for _, helper in task.helpers:
                self.metrics.shed_task_seconds.labels(helper, HELPER_STAGE).inc(seconds)

    def retried(self, task: TaskRun, reason: str) -> None:
        """A task is to run again; of a denoiser the steps after its checkpoint run twice."""
        planned, step = task.planned, task.checkpoint.step if task.checkpoint is not None else 0
        self.metrics.tasks_retried.labels(planned.model, planned.stage, reason).inc()
        if step:
            self.metrics.tasks_resumed.labels(planned.model).inc()
        if task.step > step:
            self.metrics.steps_repeated.labels(planned.model).inc(task.step - step)

    def previewed(self, workflow: str, seconds: float, *, first: bool) -> None:
        self.metrics.previews.labels(workflow).inc()
        if first:
            self.metrics.first_preview_seconds.labels(workflow).observe(seconds)

    def _stages(self, workflow: str, run: ImageRun) -> None:
        for time in run.times():
            seconds = self._child(self.metrics.stage_seconds, workflow, time.stage)
            seconds.observe(time.total_seconds)

    def _label(self, workflow: str) -> str:
        """A name that some client made up is no label."""
        return workflow if workflow in self._gateway.workflows else "unknown"

    # ------------------------------------------------------------ what is

    def refresh(self) -> None:
        """Sets the gauges to what is now, all of them for the same scrape."""
        with self.registry.at_once:
            self._refresh()

    def _refresh(self) -> None:
        gateway, metrics = self._gateway, self.metrics
        self._know()
        flights: Counter[tuple[str, str]] = Counter()
        tasks: Counter[tuple[str, str, str]] = Counter()
        for flight in gateway.flights:
            for state in flight.whereabouts():
                flights[self._label(flight.request.workflow), state] += 1
            for run in flight.runs:
                tasks.update(run.task_states())
            for model, stage in flight.held_stages if not flight.runs else ():
                tasks[model, stage, "held"] += flight.admitted
        for workflow in self._workflows:
            for state in GATEWAY_STATES:
                metrics.requests_now.labels(workflow, state).set(flights[workflow, state])
        for model, stage in self._models:
            for state in GATEWAY_STATES:
                metrics.model_tasks.labels(model, stage, state).set(tasks[model, stage, state])
        up = len(gateway.fleet.states())
        metrics.nodes.labels("up").set(up)
        metrics.nodes.labels("unreachable").set(len(gateway.fleet.connections) - up)
        for info in () if gateway.unsynced else gateway.list_workflows():
            metrics.workflow_ready.labels(info.name).set(info.ready)
        jobs = gateway.jobs.counts()
        for state, name in _JOB_STATES.items():
            metrics.jobs.labels(name).set(jobs.get(state, 0))

    def _know(self) -> None:
        """Zero is a measurement, of every workflow that is served and each stage of its models."""
        workflows = self._gateway.workflows
        models = {
            (each.models[role].identity, stage)
            for each in workflows.values()
            for role, stage in stages_of(each)
        }
        gone = self._workflows - set(workflows)
        self.metrics.forget(gone, self._models - models)
        self._workflows, self._models = set(workflows), models
        self.metrics.known(workflows, models)


def stages_of(workflow: ResolvedWorkflow) -> set[tuple[str, str]]:
    """(role, stage) of all that the workflow may ask of its models, of those that help a denoiser
    too, which no node of the graph names."""
    stages = {(node.role, node.stage) for node in workflow.graph.nodes}
    helpers = (r for r, model in workflow.models.items() if is_helper(model.component))
    return stages | {(role, HELPER_STAGE) for role in helpers}


def _outcome(error: KubeDiffusionError) -> str:
    return _OUTCOMES.get(error.grpc_code, "failed")


_OUTCOMES = {
    "INVALID_ARGUMENT": "refused",
    "NOT_FOUND": "refused",
    "ALREADY_EXISTS": "refused",
    "RESOURCE_EXHAUSTED": "shed",
    "DEADLINE_EXCEEDED": "late",
    "CANCELLED": "cancelled",
}
_JOB_STATES = {
    gateway_pb2.JOB_STATE_QUEUED: "queued",
    gateway_pb2.JOB_STATE_RUNNING: "running",
    gateway_pb2.JOB_STATE_SUCCEEDED: "succeeded",
    gateway_pb2.JOB_STATE_FAILED: "failed",
    gateway_pb2.JOB_STATE_CANCELLED: "cancelled",
}
