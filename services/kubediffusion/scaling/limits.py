# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A model's `scaling` with autoscaling/v2's defaults filled in."""

from __future__ import annotations

from dataclasses import replace

from kubediffusion.api.serving import Scaling, ScalingRules
from kubediffusion.scaling.types import DOWN, UP, Limits, Policy, PolicyType, Rules, Select


def limits_of(scaling: Scaling | None) -> Limits:
    """One replica, no more and no less, where nothing is said."""
    scaling = scaling or Scaling()
    behavior = scaling.behavior
    return Limits(
        minimum=scaling.min_replicas,
        maximum=max(scaling.min_replicas, scaling.max_replicas),
        target=float(scaling.target_per_replica),
        up=_rules(behavior.scale_up if behavior else None, UP),
        down=_rules(behavior.scale_down if behavior else None, DOWN),
    )


def _rules(rules: ScalingRules | None, default: Rules) -> Rules:
    """As the API server fills in autoscaling/v2: each field by itself."""
    if rules is None:
        return default
    filled = replace(default, select=Select(rules.select_policy))
    if rules.stabilization_window_seconds is not None:
        filled = replace(filled, window=float(rules.stabilization_window_seconds))
    if rules.policies:
        policies = tuple(
            Policy(PolicyType(each.type), each.value, float(each.period_seconds))
            for each in rules.policies
        )
        filled = replace(filled, policies=policies)
    if rules.tolerance is not None:
        filled = replace(filled, tolerance=float(rules.tolerance))
    return filled
