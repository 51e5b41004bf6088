# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Every metric of the project: its name, its labels, and what it counts. See docs/metrics.md.

A process makes one registry and hands it to the group it needs; nothing is global, so that two
nodes can live in one test. Labels have few values by construction: models are those that are
resident or planned, workflows those that are applied, reasons and outcomes words of this code.
Request ids, prompts, tenants and node addresses are never labels.

A model's label is its identity. A gauge that an autoscaler reads is set to 0 for every model that
is known (`NodeMetrics.known`, `GatewayMetrics.known`), so that zero is a measurement and a series
that is missing means that nobody knows.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from threading import RLock, Thread
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    start_http_server,
)
from prometheus_client.registry import Collector

from kubediffusion.errors import Unavailable

M = TypeVar("M", Counter, Histogram)

# Up to 5 % of a step of the smallest model, and up to minutes of a large one in a queue.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
LOAD_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 32)

MODEL_STATES = ("pending", "downloading", "loading", "ready", "failed", "evicting")
GATEWAY_STATES = ("held", "queued", "running")
READINESS = ("ready", "not_ready")


class Registry(CollectorRegistry):
    """A registry whose scrapes see all of what was set under `at_once`, or none of it.

    Scrapes come on a thread of their own. Of gauges that say something together, such as those of
    the models that one request waits for, a scrape in between would tell a part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.at_once = RLock()

    def collect(self) -> Iterator[Metric]:
        with self.at_once:
            found = list(super().collect())
        return iter(found)


class Children:
    """`metric.labels`, which costs as much as the rest of a measurement, once for each labels.

    For counters and histograms: `forget` removes gauges, and a removed child counts for nothing.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, metric: M, *labels: str) -> M:
        child: Any = self._known.get((metric, *labels))
        if child is None:
            child = self._known[metric, *labels] = metric.labels(*labels)
        return child


class BeforeScrape(Collector):
    """Collected before the gauges that it sets, since it was registered before them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.run: Callable[[], None] = lambda: None
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        self.run()
        return ()


class NodeMetrics:
    """A model node."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._before = BeforeScrape(registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"kubediffusion_node_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kubediffusion_node_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            full = f"kubediffusion_node_{name}"
            return Histogram(full, text, labels, buckets=buckets, registry=registry)

        self.tasks_queued = gauge(
            "tasks_queued", "Tasks that wait here for the device.", "model", "stage"
        )
        self.tasks_running = gauge(
            "tasks_running", "Tasks that have the device, or a part of its batch.", "model", "stage"
        )
        self.tasks = counter("tasks", "Tasks that ended here.", "model", "stage", "outcome")
        self.tasks_declined = counter("tasks_declined", "Tasks that were not taken.", "reason")
        self.failures = counter("failures", "Tasks that failed.", "model", "stage", "reason")
        self.task_queue_seconds = histogram(
            "task_queue_seconds", "From a task's arrival to its start.", SECONDS, "model", "stage"
        )
        self.task_fetch_seconds = histogram(
            "task_fetch_seconds", "Pulling a task's inputs.", SECONDS, "model", "stage"
        )
        self.task_run_seconds = histogram(
            "task_run_seconds", "Device time of a task.", SECONDS, "model", "stage"
        )
        self.denoise_steps = counter("denoise_steps", "Denoising steps done.", "model")
        self.batch_size = histogram(
            "batch_size", "Requests that shared one forward.", BATCH_SIZES, "model", "stage"
        )
        self.leases_yielded = counter("leases_yielded", "Leases given back on request.", "model")
        self.leases_preempted = counter(
            "leases_preempted", "Times a lease made way for a more urgent one.", "model"
        )
        self.checkpoints = counter("checkpoints", "Checkpoints handed out.", "model")
        self.previews = counter("previews", "Previews handed out.", "model")

        self.helping = gauge("helping", "Leases of other nodes that this node computes a part of.")
        self.assisted_steps = counter(
            "assisted_steps",
            "Parts of steps of this node's leases that another node computed: branch, control.",
            "model",
            "stage",
        )
        self.assists = counter(
            "assists",
            "Helpers of this node's leases, by how it went: done, refused, ended (by the helper), "
            "slow, lost.",
            "model",
            "stage",
            "outcome",
        )
        self.helper_wait_seconds = histogram(
            "helper_wait_seconds",
            "How long a lease waited for parts of its steps, its own being done.",
            SECONDS,
            "model",
        )

        self.model_state = gauge(
            "model_state", "1 for the state that the model is in, else 0.", "model", "state"
        )
        self.model_load_seconds = histogram(
            "model_load_seconds", "Loading a model's weights.", LOAD_SECONDS, "model"
        )
        self.model_resident_bytes = gauge("model_resident_bytes", "Weights in memory.", "model")
        self.model_failures = counter(
            "model_load_failures", "Models that could not be loaded.", "model", "reason"
        )
        self.image_tokens = counter(
            "image_tokens",
            "Image tokens that came to the prunable blocks of pruned requests, by whether these "
            "kept or skipped them.",
            "model",
            "outcome",
        )
        self.steps_reused = counter(
            "steps_reused",
            "Denoising steps that a step cache left out; they are in denoise_steps too.",
            "model",
        )
        self.compiled_graphs = gauge(
            "compiled_graphs", "Graphs of torch.compile that the model has.", "model"
        )
        self.compile_seconds = counter(
            "compile_seconds", "Making them, before the model was ready and since.", "model"
        )
        self.memory_limit_bytes = gauge("memory_limit_bytes", "What models may take together.")
        self.residency_generation = gauge(
            "residency_generation", "Generation of the plan that is carried out."
        )
        self.tensors = gauge("tensors", "Tensors kept for requests.")
        self.tensor_bytes = gauge("tensor_bytes", "Their size.")
        self.tensor_held_bytes = gauge(
            "tensor_held_bytes", "Memory taken for tensors, kept warm for reuse included."
        )
        self.fetched_bytes = counter(
            "fetched_bytes", "Bytes of tensors sent to other processes by gRPC."
        )
        self.gateways = gauge("gateways", "Gateways with a Work stream to this node.")
        self.draining = gauge("draining", "1 while the node takes no new tasks.")

    def on_scrape(self, refresh: Callable[[], None]) -> None:
        """`refresh` sets gauges; it is called in the thread that answers a scrape."""
        self._before.run = refresh

    def known(self, model: str, stages: Iterable[str]) -> None:
        """The model is planned here: its queue is 0, not missing."""
        for stage in stages:
            self.tasks_queued.labels(model, stage)
            self.tasks_running.labels(model, stage)

    def set_model_state(self, model: str, state: str) -> None:
        """`state` is one of MODEL_STATES."""
        for each in MODEL_STATES:
            self.model_state.labels(model, each).set(each == state)

    def forget(self, model: str, stages: Iterable[str]) -> None:
        """The model is planned here no more: its gauges go; counters stay, as counters must."""
        for stage in stages:
            _remove(self.tasks_queued, model, stage)
            _remove(self.tasks_running, model, stage)
        for state in MODEL_STATES:
            _remove(self.model_state, model, state)
        _remove(self.model_resident_bytes, model)
        _remove(self.compiled_graphs, model)


class GatewayMetrics:
    """A gateway: requests by workflow, and the demand by model that autoscaling reads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"kubediffusion_gateway_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kubediffusion_gateway_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            full = f"kubediffusion_gateway_{name}"
            return Histogram(full, text, labels, buckets=SECONDS, registry=registry)

        self.requests = counter("requests", "Requests that ended.", "workflow", "outcome")
        self.request_seconds = histogram(
            "request_seconds", "From a request's arrival to its end.", "workflow", "outcome"
        )
        self.first_preview_seconds = histogram(
            "first_preview_seconds", "From a request's arrival to its first preview.", "workflow"
        )
        self.requests_now = gauge(
            "requests_now",
            "Requests by where they are: held, queued, running.",
            "workflow",
            "state",
        )
        self.model_tasks = gauge(
            "model_tasks",
            "Tasks by where they are. A request is held for each of its models without a node.",
            "model",
            "stage",
            "state",
        )
        self.shed = counter(
            "shed",
            "Requests refused because they could not be served in time.",
            "workflow",
            "reason",
        )
        self.shed_task_seconds = counter(
            "shed_task_seconds",
            "Run time of the tasks that were shed: demand too.",
            "model",
            "stage",
        )
        self.tasks_retried = counter(
            "tasks_retried", "Tasks handed out again.", "model", "stage", "reason"
        )
        self.tasks_resumed = counter(
            "tasks_resumed", "Denoising that went on elsewhere from a checkpoint.", "model"
        )
        self.steps_repeated = counter(
            "steps_repeated", "Denoising steps that ran twice, being after a checkpoint.", "model"
        )
        self.images = counter("images", "Images sent.", "workflow")
        self.previews = counter("previews", "Previews sent.", "workflow")
        self.stage_seconds = histogram(
            "stage_seconds", "From handing a task out to its end.", "workflow", "stage"
        )
        self.nodes = gauge("nodes", "Known nodes, by whether they answer.", "state")
        self.workflow_ready = gauge(
            "workflow_ready", "1 while every model of the workflow has a node.", "workflow"
        )
        self.http_requests = counter("http_requests", "HTTP answers.", "route", "code")
        self.http_request_seconds = histogram("http_request_seconds", "Time to answer.", "route")
        self.jobs = gauge(
            "jobs",
            "Jobs by state: running here; others in the whole database (of gateways: max).",
            "state",
        )

    def known(self, workflows: Iterable[str] = (), models: Iterable[tuple[str, str]] = ()) -> None:
        """Of these (models as (identity, stage)) 0 is reported, not nothing."""
        for workflow in workflows:
            for state in GATEWAY_STATES:
                self.requests_now.labels(workflow, state)
        for model, stage in models:
            self.shed_task_seconds.labels(model, stage)
            for state in GATEWAY_STATES:
                self.model_tasks.labels(model, stage, state)

    def forget(self, workflows: Iterable[str] = (), models: Iterable[tuple[str, str]] = ()) -> None:
        """Nobody uses these any more: their gauges go; counters stay, as counters must."""
        for workflow in workflows:
            _remove(self.workflow_ready, workflow)
            for state in GATEWAY_STATES:
                _remove(self.requests_now, workflow, state)
        for model, stage in models:
            for state in GATEWAY_STATES:
                _remove(self.model_tasks, model, stage, state)


class SupervisorMetrics:
    """The local runtime's supervisor of node processes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "kubediffusion_supervisor"
        self.nodes = Gauge(f"{prefix}_nodes", "Node processes alive.", registry=registry)
        self.restarts = Counter(
            f"{prefix}_restarts",
            "Node processes started anew after one ended.",
            ("reason",),
            registry=registry,
        )


class OperatorMetrics:
    """The operator. Objects are counted by kind, never by name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"kubediffusion_operator_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kubediffusion_operator_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(
                f"kubediffusion_operator_{name}_seconds",
                text,
                labels,
                buckets=SECONDS,
                registry=registry,
            )

        self.reconcile_seconds = seconds(
            "reconcile", "One namespace, from looking at it to the last write.", "outcome"
        )
        self.plan_seconds = seconds("plan", "Planning one namespace.")
        self.queue_depth = gauge("queue_depth", "Namespaces that wait to be reconciled.")
        self.writes = counter("writes", "Objects written.", "kind", "verb")
        self.api_errors = counter(
            "api_errors", "Calls that the API server refused or did not answer.", "verb", "code"
        )
        self.watch_trouble = gauge("watch_trouble", "1 while a kind's watch is down.", "kind")
        self.heartbeat_age_seconds = gauge(
            "heartbeat_age_seconds", "Since the event loop last did its round."
        )
        self.workflows = gauge("workflows", "Workflows by readiness.", "state")
        self.models = gauge("models", "Models by readiness.", "state")
        self.resolutions = counter(
            "resolutions", "Workflows looked up in their sources, by how it went.", "outcome"
        )
        self.residency_calls = counter(
            "residency_calls", "Plans sent to nodes, by how it went.", "outcome"
        )
        self.autoscale_seconds = seconds(
            "autoscale", "One round of the autoscaler, all namespaces.", "outcome"
        )
        self.autoscaled_models = gauge(
            "autoscaled_models",
            "Models that the autoscaler scales, by how far their demand is known.",
            "state",
        )
        self.scalings = counter("scalings", "Changes of a model's replicas, by why.", "reason")
        for gauges in (self.workflows, self.models):
            for state in READINESS:
                gauges.labels(state).set(0)


def _remove(gauge: Gauge, *labels: str) -> None:
    try:
        gauge.remove(*labels)
    except KeyError:  # it never was there
        return


class MetricsServer:
    """Answers /metrics on a thread of its own."""

    def __init__(self, server: WSGIServer, thread: Thread) -> None:
        self._server = server
        self._thread = thread

    @property
    def port(self) -> int:
        return self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(
    registry: CollectorRegistry, host: str = "127.0.0.1", port: int = 0
) -> MetricsServer:
    """Port 0 takes a free one. Raises Unavailable, reason PortInUse."""
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        why = "another process holds it" if in_use else error.strerror or str(error)
        raise Unavailable(
            f"cannot serve metrics on {host}:{port}: {why}; choose another port, "
            "or 0 for a free one",
            field="metrics_port",
            reason="PortInUse" if in_use else "AddressUnavailable",
        ) from error
    return MetricsServer(server, thread)
