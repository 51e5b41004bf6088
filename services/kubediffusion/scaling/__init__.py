# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How many replicas each model should have. Pure.

`decide` is for one model; `decide_all` for the models of a namespace, which share a GPU budget and
come up from zero together.
"""

from kubediffusion.scaling.decide import decide
from kubediffusion.scaling.history import ScaleEvent, ScalingHistory
from kubediffusion.scaling.limits import limits_of
from kubediffusion.scaling.namespace import Book, Namespace, Round, decide_all
from kubediffusion.scaling.types import (
    Budget,
    Decision,
    Demand,
    Limits,
    Metrics,
    MetricState,
    ModelCase,
    Observation,
    Policy,
    PolicyType,
    Reason,
    Rules,
    Select,
    WorkflowCase,
)

__all__ = [
    "Book",
    "Budget",
    "Decision",
    "Demand",
    "Limits",
    "MetricState",
    "Metrics",
    "ModelCase",
    "Namespace",
    "Observation",
    "Policy",
    "PolicyType",
    "Reason",
    "Round",
    "Rules",
    "ScaleEvent",
    "ScalingHistory",
    "Select",
    "WorkflowCase",
    "decide",
    "decide_all",
    "limits_of",
]
