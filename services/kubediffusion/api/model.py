# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""DiffusionModel, one for each identity, and ModelPool, nodes that host several models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kubediffusion.api.serving import Placement, Pruning, Resources, Scaling
from kubediffusion.api.types import (
    Condition,
    DottedName,
    Dtype,
    Embedded,
    Metadata,
    ObjectName,
    Resource,
    Rule,
    Seconds,
    Source,
    map_list,
)
from kubediffusion.api.workflow import Lora

Conditions = Annotated[
    tuple[Condition, ...], Field(max_length=16, json_schema_extra=map_list("type"))
]
Count = Annotated[int, Field(ge=0, le=100000)]
Generation = Annotated[int, Field(ge=0)]


class ModelSpec(Resource):
    """One loadable network and how it is served. What changes arithmetic cannot be changed."""

    family: Literal["sd3"]
    component: DottedName
    source: Source
    class_name: Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9_]*$")] = ""
    dtype: Dtype = "float32"
    attention_backend: Annotated[str, Field(max_length=32, pattern=r"^[a-z0-9_]*$")] = ""
    compile: Literal["none", "default", "max-autotune"] = "none"
    quantization: Annotated[str, Field(max_length=32, pattern=r"^[a-z0-9_]*$")] = ""
    tiling: bool = False
    pruning: Pruning | None = None
    loras: Annotated[
        tuple[Lora, ...], Field(max_length=64, json_schema_extra=map_list("name"))
    ] = ()
    replicas: Annotated[
        int | None,
        Field(ge=0, le=1000, description="One owner: the autoscaler, HPA, KEDA or kubectl scale."),
    ] = None
    resources: Resources | None = None
    scaling: Scaling | None = None
    placement: Placement | None = None
    pod_template: Annotated[
        Embedded | None, Field(description="Merged over the pods of this model.")
    ] = None
    drain_seconds: Annotated[Seconds, Field(description="Time a node has to end its work.")] = 120

    rules = (
        Rule(
            field="source",
            cel="self.source == oldSelf.source && self.component == oldSelf.component "
            "&& self.dtype == oldSelf.dtype",
            message="a model's source, component and dtype are its identity: make another model",
            holds=lambda m: True,  # between two versions of an object; only a cluster has both
        ),
    )


class ModelUser(Resource):
    """A workflow that uses the model."""

    name: ObjectName
    role: DottedName


class Failure(Resource):
    """The last failure of a node that hosts the model."""

    reason: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=4096)] = ""
    exit_code: int | None = None
    time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class ScalingDecision(Resource):
    """One decision of the autoscaler, with the numbers behind it."""

    time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    from_replicas: Count
    to_replicas: Count
    reason: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=1024)] = ""


class ModelStatus(Resource):
    observed_generation: Generation = 0
    identity: Annotated[str, Field(max_length=63)] = ""
    digest: Annotated[str, Field(max_length=128, description="Of the weight files.")] = ""
    replicas: Count = 0
    ready_replicas: Count = 0
    desired_replicas: Count = 0
    selector: Annotated[str, Field(max_length=1024)] = ""
    reason: Annotated[str, Field(max_length=64)] = ""
    referenced_by: Annotated[tuple[ModelUser, ...], Field(max_length=256)] = ()
    scaling_history: Annotated[tuple[ScalingDecision, ...], Field(max_length=20)] = ()
    last_failure: Failure | None = None
    conditions: Conditions = ()


class DiffusionModel(Resource):
    """One model, served to all workflows that use it."""

    api_version: Literal["kubediffusion.io/v1alpha1"]
    kind: Literal["DiffusionModel"]
    metadata: Metadata
    spec: ModelSpec
    status: ModelStatus | None = None


class PoolSpec(Resource):
    """Like nodes, one accelerator each, that host several models."""

    replicas: Annotated[int, Field(ge=0, le=1000)] = 1
    memory_limit: Annotated[
        str,
        Field(
            max_length=32,
            pattern=r"^[0-9]+(\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$",
            description="What a node's models may take of its accelerator; all where left out.",
        ),
    ] = ""
    resources: Resources | None = None
    pod_template: Annotated[
        Embedded | None, Field(description="Merged over the pods of this pool.")
    ] = None
    drain_seconds: Annotated[Seconds, Field(description="Time a node has to end its work.")] = 120


class PlannedModel(Resource):
    """A model of the plan and the nodes that host it."""

    model: Annotated[str, Field(max_length=63)]
    nodes: Annotated[tuple[ObjectName, ...], Field(max_length=1000)] = ()


class PoolStatus(Resource):
    observed_generation: Generation = 0
    replicas: Count = 0
    ready_replicas: Count = 0
    desired_replicas: Count = 0
    reason: Annotated[str, Field(max_length=64)] = ""
    plan_generation: Generation = 0
    plan: Annotated[tuple[PlannedModel, ...], Field(max_length=256)] = ()
    conditions: Conditions = ()


class ModelPool(Resource):
    """Model nodes that several models share."""

    api_version: Literal["kubediffusion.io/v1alpha1"]
    kind: Literal["ModelPool"]
    metadata: Metadata
    spec: PoolSpec
    status: PoolStatus | None = None
