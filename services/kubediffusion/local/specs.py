# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A resolved workflow's models as the planner sends them to nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kubediffusion.v1alpha1 import node_pb2

if TYPE_CHECKING:
    from kubediffusion.workflow import ModelRef


def model_spec(model: ModelRef) -> node_pb2.ModelSpec:
    return node_pb2.ModelSpec(
        identity=model.identity,
        family=model.family,
        component=model.component,
        uri=model.uri,
        revision=model.revision,
        subfolder=model.subfolder,
        variant=model.variant,
        dtype=model.dtype,
        class_name=model.class_name,
        options=dict(model.options),
        loras=[
            node_pb2.LoraUse(
                name=lora.name,
                uri=lora.uri,
                revision=lora.revision,
                scale=lora.scale,
                subfolder=lora.subfolder,
                weight_name=lora.weight_name,
            )
            for lora in model.loras
        ],
    )
