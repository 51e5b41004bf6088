# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The replicas of one model, with as many GPUs as it likes.

desired = ceil(demand / target), as a HorizontalPodAutoscaler with an external metric of type
AverageValue; then that one's tolerance, windows, limits and rates, in this order. Different from
it: from zero the first replica comes by demand, numbers that nobody vouches for never lower
anything, and replicas that cannot start are no capacity.
"""

from __future__ import annotations

import math

from kubediffusion.scaling.behavior import rate_limited, stabilized
from kubediffusion.scaling.history import ScalingHistory
from kubediffusion.scaling.types import Decision, Limits, MetricState, Observation, Reason

# A demand of 0.3 in three parts is three replicas of 0.1, not four.
_EXACT = 1e-9


def decide(
    observation: Observation, limits: Limits, history: ScalingHistory, now: float
) -> Decision:
    """`history` is of the rounds before this one; remember `Decision.wanted` with it.

    The limits hold whatever the demand is, what is known of it, and how fast one may go.
    """
    current = observation.current
    wanted, reason = _wanted(observation, limits)
    stable = stabilized(wanted, current, limits, history, now)
    if stable != wanted:
        reason = Reason.STABILIZING
    bounded = max(limits.minimum, min(limits.maximum, stable))
    if bounded != stable:
        reason = Reason.AT_MAXIMUM if bounded < stable else Reason.AT_MINIMUM
    limited = rate_limited(bounded, current, limits, history, now)
    if limited != bounded:
        reason = Reason.RATE_LIMITED
    if limited > current and _in_vain(observation):
        limited, reason = current, Reason.CANNOT_START
    replicas = max(limits.minimum, min(limits.maximum, limited))
    if current < limits.minimum == replicas:
        reason = Reason.BELOW_MINIMUM
    elif current > limits.maximum == replicas:
        reason = Reason.ABOVE_MAXIMUM
    return Decision(replicas, wanted, reason, _message(observation, limits, wanted))


def _wanted(observation: Observation, limits: Limits) -> tuple[int, Reason]:
    """What the demand alone asks for."""
    current, metrics = observation.current, observation.metrics
    if metrics.state is MetricState.UNKNOWN:
        return current, Reason.METRICS_UNKNOWN
    wanted = _by_demand(observation, limits)
    if metrics.state is MetricState.PARTIAL and wanted <= current:
        return current, Reason.METRICS_PARTIAL
    if wanted == current:
        return wanted, Reason.STEADY
    if wanted < current:
        return wanted, Reason.TO_ZERO if wanted == 0 else Reason.FELL
    return wanted, Reason.ACTIVATED if current == 0 else Reason.ROSE


def _by_demand(observation: Observation, limits: Limits) -> int:
    """ceil(demand / target), or the capacity that there is where that is nearly right."""
    total, capacity = observation.demand.total, observation.capacity
    if capacity > 0:
        ratio = total / (limits.target * capacity)
        if 1 - limits.down.tolerance <= ratio <= 1 + limits.up.tolerance:
            return capacity
    return math.ceil(total / limits.target - _EXACT)


def _in_vain(observation: Observation) -> bool:
    """Where half of the replicas cannot start, the next ones hardly will."""
    return observation.stuck > 0 and 2 * observation.stuck >= observation.current


def _message(observation: Observation, limits: Limits, wanted: int) -> str:
    metrics = observation.metrics
    if metrics.state is MetricState.UNKNOWN:
        return f"demand unknown ({metrics.why}): {observation.current} replicas are kept"
    least = "at least " if metrics.state is MetricState.PARTIAL else ""
    text = f"demand {least}{observation.demand} at {limits.target:g} a replica asks for {wanted}"
    text += f"; limits {limits.minimum} to {limits.maximum}; {observation.ready} ready"
    if observation.stuck:
        text += f", {observation.stuck} cannot start ({observation.stuck_reason})"
    return text
