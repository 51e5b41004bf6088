# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Shiva-DiT: static-budget token pruning for diffusers' transformers (arXiv 2602.05605).

>>> config = ShivaConfig("folder or hub id", budget=0.6, pipeline=pipe)
>>> handle = apply_shiva(pipe.transformer, config)
>>> image = pipe("a red circle").images[0]
>>> handle.remove()

Names are imported on first use, so that `shiva_kernels.tables` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shiva_kernels.apply import ShivaHandle, apply_shiva
    from shiva_kernels.artifact import Artifact, ShippedTable
    from shiva_kernels.config import Guidance, KeepMap, PairScore, ShivaConfig
    from shiva_kernels.errors import ArtifactMismatch, ShivaError, Unsupported
    from shiva_kernels.policy import BudgetLoss, RatioPolicy
    from shiva_kernels.router import ShivaRouter
    from shiva_kernels.state import (
        BlockRecord,
        Conditions,
        PruningRequest,
        Record,
        TrainingPlan,
    )
    from shiva_kernels.tables import KTable, RatioCurve, build_table

_HOMES = {
    "apply": ("ShivaHandle", "apply_shiva"),
    "artifact": ("Artifact", "ShippedTable"),
    "config": ("Guidance", "KeepMap", "PairScore", "ShivaConfig"),
    "errors": ("ArtifactMismatch", "ShivaError", "Unsupported"),
    "policy": ("BudgetLoss", "RatioPolicy"),
    "router": ("ShivaRouter",),
    "state": ("BlockRecord", "Conditions", "PruningRequest", "Record", "TrainingPlan"),
    "tables": ("KTable", "RatioCurve", "build_table"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Artifact",
    "ArtifactMismatch",
    "BlockRecord",
    "BudgetLoss",
    "Conditions",
    "Guidance",
    "KTable",
    "KeepMap",
    "PairScore",
    "PruningRequest",
    "RatioCurve",
    "RatioPolicy",
    "Record",
    "ShippedTable",
    "ShivaConfig",
    "ShivaError",
    "ShivaHandle",
    "ShivaRouter",
    "TrainingPlan",
    "Unsupported",
    "apply_shiva",
    "build_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
