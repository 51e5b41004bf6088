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
    current, hindrance = observation.current, ""
    wanted, reason = _wanted(observation, limits)
    replicas, brake = _braked(wanted, current, limits, history, now)
    if replicas > current and _in_vain(observation):
        replicas, brake = current, Reason.CANNOT_START
        hindrance = f"replicas cannot start ({observation.stuck_reason}): more would not help"
    replicas = max(limits.minimum, min(limits.maximum, replicas))
    message = _message(observation, limits, wanted)
    if brake is not None:
        reason, message = brake, f"{message}; {brake.value}: {replicas} for now"
    if replicas != current:
        reason = _change(current, replicas, limits)
    return Decision(replicas, wanted, reason, message, hindrance)


def _wanted(observation: Observation, limits: Limits) -> tuple[int, Reason]:
    """What the demand alone asks for."""
    current, metrics = observation.current, observation.metrics
    if metrics.state is MetricState.UNKNOWN:
        return current, Reason.METRICS_UNKNOWN
    wanted = _by_demand(observation, limits)
    if metrics.state is MetricState.PARTIAL and wanted <= current:
        return current, Reason.METRICS_PARTIAL
    return wanted, Reason.STEADY


def _braked(
    wanted: int, current: int, limits: Limits, history: ScalingHistory, now: float
) -> tuple[int, Reason | None]:
    """What of it is to be now, and what is in the way of the rest."""
    brake = None
    stable = stabilized(wanted, current, limits, history, now)
    if stable != wanted:
        brake = Reason.STABILIZING
    bounded = max(limits.minimum, min(limits.maximum, stable))
    if bounded != stable:
        brake = Reason.AT_MAXIMUM if bounded < stable else Reason.AT_MINIMUM
    limited = rate_limited(bounded, current, limits, history, now)
    return limited, brake if limited == bounded else Reason.RATE_LIMITED


def _change(current: int, replicas: int, limits: Limits) -> Reason:
    if current < limits.minimum == replicas:
        return Reason.BELOW_MINIMUM
    if current > limits.maximum == replicas:
        return Reason.ABOVE_MAXIMUM
    if replicas > current:
        return Reason.ROSE if current else Reason.ACTIVATED
    return Reason.FELL if replicas else Reason.TO_ZERO


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
