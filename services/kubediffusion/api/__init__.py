# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The custom resources' types, their checks, and the identity of a model. Pure."""

from kubediffusion.api.identity import Arithmetic, identity
from kubediffusion.api.load import did_you_mean, load, load_workflow
from kubediffusion.api.model import DiffusionModel, ModelPool
from kubediffusion.api.types import Source
from kubediffusion.api.workflow import DiffusionWorkflow

__all__ = [
    "Arithmetic",
    "DiffusionModel",
    "DiffusionWorkflow",
    "ModelPool",
    "Source",
    "did_you_mean",
    "identity",
    "load",
    "load_workflow",
]
