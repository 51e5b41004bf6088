# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The behaviour of autoscaling/v2: how sure one has to be of a change, and how fast it may go."""

from __future__ import annotations

import math

from kubediffusion.scaling.history import ScalingHistory
from kubediffusion.scaling.types import Limits, Policy, PolicyType, Rules, Select

# Percentages are of whole replicas, so that 100 % of 3 is not 3.0000000000000004.
_EXACT = 1e-9


def stabilized(
    wanted: int, current: int, limits: Limits, history: ScalingHistory, now: float
) -> int:
    """`wanted` as far as the whole of a window agrees: up with its least recommendation, down with
    its greatest."""
    up = min([wanted, *history.within(now, limits.up.window)])
    down = max([wanted, *history.within(now, limits.down.window)])
    return min(max(current, up), down)


def rate_limited(
    wanted: int, current: int, limits: Limits, history: ScalingHistory, now: float
) -> int:
    """`wanted` as far as the policies let one go from `current` now."""
    if wanted > current:
        return min(wanted, max(current, _highest(current, limits.up, history, now)))
    if wanted < current:
        return max(wanted, min(current, _lowest(current, limits.down, history, now)))
    return current


def _highest(current: int, rules: Rules, history: ScalingHistory, now: float) -> int:
    if rules.select is Select.DISABLED:
        return current

    def reach(policy: Policy) -> int:
        before = max(0, current - history.added(now, policy.period))
        if policy.type is PolicyType.PODS:
            return before + policy.value
        return math.ceil(before * (1 + policy.value / 100) - _EXACT)

    highest = _select(rules, [reach(policy) for policy in rules.policies], most=True)
    # A share of nothing is nothing: no policy but Disabled keeps a model down.
    return max(1, highest) if current == 0 else highest


def _lowest(current: int, rules: Rules, history: ScalingHistory, now: float) -> int:
    if rules.select is Select.DISABLED:
        return current

    def reach(policy: Policy) -> int:
        before = current - history.added(now, policy.period)
        if policy.type is PolicyType.PODS:
            return before - policy.value
        return math.floor(before * (1 - policy.value / 100) + _EXACT)

    return max(0, _select(rules, [reach(policy) for policy in rules.policies], most=False))


def _select(rules: Rules, reaches: list[int], *, most: bool) -> int:
    """Max picks the policy that changes most: the greatest number up, the least number down."""
    return max(reaches) if (rules.select is Select.MAX) == most else min(reaches)
