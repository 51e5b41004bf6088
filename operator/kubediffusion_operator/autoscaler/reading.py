# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What Prometheus knows of the demand, and how far that can be trusted.

Gateways are its witnesses: each reports the tasks of every model that it serves, zeros included.
Who should report is taken from `up`, which has a series for each gateway that Prometheus is told to
scrape, and says 0 where one does not answer. Series are of Kubernetes' namespaces by their label
`namespace`; a gateway is known by `component="gateway"`, as the chart's scrape configuration and
its monitors set them.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from kubediffusion.scaling import Demand, Metrics, MetricState
from kubediffusion_operator.autoscaler.prometheus import Answer, Prometheus, Sample

# (namespace, name)
Key: TypeAlias = "tuple[str, str]"

TASKS = "kubediffusion_gateway_model_tasks"
REQUESTS = "kubediffusion_gateway_requests_now"
STATES = ("held", "queued", "running")
# Long enough for four scrapes at 15 s; what was shed before is forgotten.
SHED_WINDOW_SECONDS = 60


@dataclass(frozen=True)
class Reading:
    """Everything, of all namespaces. `ages` are seconds since each gateway's last word on a model,
    `gateways` whether each answers; both by instance."""

    tasks: Mapping[Key, Mapping[str, float]] = field(default_factory=dict[Key, "dict[str, float]"])
    shed: Mapping[Key, float] = field(default_factory=dict[Key, float])
    held: Mapping[Key, float] = field(default_factory=dict[Key, float])
    ages: Mapping[Key, Mapping[str, float]] = field(default_factory=dict[Key, "dict[str, float]"])
    gateways: Mapping[str, Mapping[str, bool]] = field(default_factory=dict[str, "dict[str, bool]"])
    warnings: tuple[str, ...] = ()


def queries(stale_seconds: float) -> dict[str, str]:
    """What is stale raises nothing either.

    The demand for models and the requests of workflows are one query, because they have to be of
    the same scrape: a workflow of which one model seems not to be needed would come up in part.
    """

    def fresh(series: str) -> str:
        return f"({series} and (time() - timestamp({series}) <= {stale_seconds:g}))"

    held = fresh(f'{REQUESTS}{{state="held"}}')
    return {
        "demand": f"sum by (namespace, model, state) {fresh(TASKS)}"
        f" or sum by (namespace, workflow) {held}",
        "ages": f"max by (namespace, model, instance) (time() - timestamp({TASKS}))",
        "shed": "sum by (namespace, model) (rate(kubediffusion_gateway_shed_task_seconds_total"
        f"[{SHED_WINDOW_SECONDS}s]))",
        "gateways": 'min by (namespace, instance) (up{component="gateway"})',
    }


async def read(prometheus: Prometheus, stale_seconds: float) -> Reading:
    """All queries at once. Raises PrometheusUnavailable where any of them fails."""
    wanted = queries(stale_seconds)
    answers = await asyncio.gather(*(prometheus.query(each) for each in wanted.values()))
    return reading_of(dict(zip(wanted, answers, strict=True)))


def reading_of(answers: Mapping[str, Answer]) -> Reading:
    """Series without the labels that they should have are nobody's."""
    tasks: dict[Key, dict[str, float]] = defaultdict(dict)
    ages: dict[Key, dict[str, float]] = defaultdict(dict)
    gateways: dict[str, dict[str, bool]] = defaultdict(dict)
    for key, sample in _keyed(answers["demand"], "model"):
        tasks[key][sample.labels.get("state", "")] = sample.value
    for key, sample in _keyed(answers["ages"], "model"):
        ages[key][sample.labels.get("instance", "")] = sample.value
    for (namespace, instance), sample in _keyed(answers["gateways"], "instance"):
        gateways[namespace][instance] = sample.value == 1
    warnings = {warning for answer in answers.values() for warning in answer.warnings}
    return Reading(
        tasks=dict(tasks),
        shed={key: sample.value for key, sample in _keyed(answers["shed"], "model")},
        held={key: sample.value for key, sample in _keyed(answers["demand"], "workflow")},
        ages=dict(ages),
        gateways=dict(gateways),
        warnings=tuple(sorted(warnings)),
    )


def _keyed(answer: Answer, label: str) -> list[tuple[Key, Sample]]:
    return [
        ((sample.labels["namespace"], sample.labels[label]), sample)
        for sample in answer.samples
        if sample.labels.get("namespace") and sample.labels.get(label)
    ]


def demand_of(
    reading: Reading, namespace: str, model: str, stale_seconds: float
) -> tuple[Demand, Metrics]:
    """The demand that is known of, and whether that is all. Messages tell what to look at."""
    key = (namespace, model)
    gateways, ages = reading.gateways.get(namespace, {}), reading.ages.get(key, {})
    answering = {instance for instance, up in gateways.items() if up}
    reporting = {i for i, age in ages.items() if age <= stale_seconds} & answering
    unknown = _unknown(gateways, answering, ages, reporting, namespace, stale_seconds)
    if unknown is not None:
        return Demand(), unknown
    tasks, shed = reading.tasks.get(key, {}), reading.shed.get(key, 0.0)
    numbers = [*(tasks[state] for state in STATES if state in tasks), shed]
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        why = f"{TASKS} of this model has a value that is no count: somebody else writes it"
        return Demand(), Metrics(MetricState.UNKNOWN, "MetricsInvalid", why)
    parts = {state: tasks.get(state, 0.0) for state in STATES}
    lacking = [state for state in STATES if state not in tasks]
    return Demand(shed=shed, **parts), _doubts(reading, gateways, answering, reporting, lacking)


def _unknown(
    gateways: Mapping[str, bool],
    answering: set[str],
    ages: Mapping[str, float],
    reporting: set[str],
    namespace: str,
    stale_seconds: float,
) -> Metrics | None:
    def because(reason: str, why: str) -> Metrics:
        return Metrics(MetricState.UNKNOWN, reason, why)

    if not gateways:
        return because(
            "NoGateway",
            f'Prometheus knows no gateway of namespace {namespace} (up{{component="gateway"}}): '
            "see that one runs there, and that its pods are scraped with the labels namespace and "
            "component",
        )
    if not answering:
        return because(
            "GatewaysDown", f"none of the {len(gateways)} gateways answers Prometheus (up is 0)"
        )
    if not ages:
        return because(
            "SeriesMissing",
            f"no gateway reports {TASKS} of this model: none serves a workflow with it yet, or "
            "a relabelling drops the series",
        )
    if not reporting:
        return because(
            "MetricsStale",
            f"the newest number is older than {stale_seconds:g} s: Prometheus has stopped scraping",
        )
    return None


def _doubts(
    reading: Reading,
    gateways: Mapping[str, bool],
    answering: set[str],
    reporting: set[str],
    lacking: list[str],
) -> Metrics:
    def because(reason: str, why: str) -> Metrics:
        return Metrics(MetricState.PARTIAL, reason, why)

    if lacking:
        return because("SeriesMissing", f"{TASKS} has no state {' and no '.join(lacking)}")
    if len(answering) < len(gateways):
        down = len(gateways) - len(answering)
        return because(
            "GatewayDown", f"{down} of {len(gateways)} gateways do not answer Prometheus (up is 0)"
        )
    if len(reporting) < len(answering):
        silent = len(answering) - len(reporting)
        return because(
            "GatewaySilent", f"{silent} of {len(answering)} gateways do not report this model"
        )
    if reading.warnings:
        return because("PartialAnswer", f"Prometheus warns: {reading.warnings[0]}")
    return Metrics(MetricState.KNOWN, "MetricsFound", "all gateways report")
