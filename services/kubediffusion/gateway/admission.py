# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Whether a request is taken now, and until when it has to be done."""

from __future__ import annotations

from collections.abc import Sequence

from kubediffusion.errors import Overloaded
from kubediffusion.gateway.nodes import Fleet
from kubediffusion.gateway.plan import PlannedTask
from kubediffusion.scheduling.admission import AdmissionLimits, Admit, ShedReason, decide
from kubediffusion.scheduling.fleet import serving
from kubediffusion.scheduling.profiles import Profiles
from kubediffusion.workflow import Slo


def promised_seconds(slo: Slo, solo: float | None) -> float | None:
    """How long a request may take whose client names no deadline; None: as long as it does."""
    if slo.deadline_seconds is not None:
        return slo.deadline_seconds
    if slo.latency_scale is not None and solo is not None:
        return slo.latency_scale * solo
    return None


def solo_seconds(tasks: Sequence[PlannedTask], profiles: Profiles) -> float | None:
    """The longest way through the graph with nobody else there; None before all was measured."""
    ends: dict[str, float] = {}
    for task in tasks:
        run = profiles.measured_run(task.model, task.stage, "", task.units)
        if run is None:
            return None
        start = max((ends[source] for source, _ in task.ports.values()), default=0.0)
        ends[task.name] = start + run
    return max(ends.values(), default=None)


def work_ahead_seconds(tasks: Sequence[PlannedTask], fleet: Fleet) -> float:
    """The wait at the busiest of the models: of each, that of its least busy node."""
    waits = (
        min((node.queue_seconds for node in serving(fleet.states_with(model), model)), default=0.0)
        for model in {task.model for task in tasks}
    )
    return max(waits, default=0.0)


def admit(
    tasks: Sequence[PlannedTask],
    fleet: Fleet,
    *,
    solo: float | None,
    remaining: float | None,
    in_flight: int,
    images: int,
    cold: bool,
    limits: AdmissionLimits,
) -> None:
    """Raises Overloaded, with the seconds after which to come again.

    A cold request is judged by the bound of the queue alone: how long a model takes to come up is
    not known, and the activation timeout bounds its wait.
    """
    verdict = decide(
        work_ahead_seconds=0.0 if cold else work_ahead_seconds(tasks, fleet),
        solo_seconds=solo,
        deadline_remaining=None if cold else remaining,
        queue_len=in_flight,
        limits=limits,
        images=images,
    )
    if isinstance(verdict, Admit):
        return
    if verdict.reason is ShedReason.QUEUE_FULL:
        text = f"{in_flight} images are under way, and the limit is {limits.max_queue}"
    else:
        text = f"the work ahead leaves no time to finish within {remaining or 0:.2f} s"
    raise Overloaded(
        f"{text}; try again in {verdict.retry_after:.1f} s",
        retry_after=verdict.retry_after,
        reason=verdict.reason.value,
    )
