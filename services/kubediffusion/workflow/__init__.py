# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The workflow language: `resolve` a workflow once, `bind` and `expand` each request. Pure."""

from kubediffusion.workflow.bind import bind, seed_from_key
from kubediffusion.workflow.budget import choose_budget, offered_budgets, work_share
from kubediffusion.workflow.caching import computed_share
from kubediffusion.workflow.expand import expand
from kubediffusion.workflow.resolve import resolve, sources
from kubediffusion.workflow.revision import (
    Revision,
    decode,
    encode,
    pinned_spec,
    revision_name,
)
from kubediffusion.workflow.values import (
    Bound,
    Constant,
    Facts,
    InputSpec,
    InputType,
    LoraDecl,
    LoraUse,
    ModelRef,
    PipelineIndex,
    PortRef,
    Pruning,
    ResolvedWorkflow,
    Slo,
    StepCache,
    Task,
    Value,
)

__all__ = [
    "Bound",
    "Constant",
    "Facts",
    "InputSpec",
    "InputType",
    "LoraDecl",
    "LoraUse",
    "ModelRef",
    "PipelineIndex",
    "PortRef",
    "Pruning",
    "ResolvedWorkflow",
    "Revision",
    "Slo",
    "StepCache",
    "Task",
    "Value",
    "bind",
    "choose_budget",
    "computed_share",
    "decode",
    "encode",
    "expand",
    "offered_budgets",
    "pinned_spec",
    "resolve",
    "revision_name",
    "seed_from_key",
    "sources",
    "work_share",
]
