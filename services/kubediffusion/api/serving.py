# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How a model is served: resources, scaling, placement, pruning. Shared by all three resources."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kubediffusion.api.types import (
    Decimal,
    Dtype,
    Embedded,
    ObjectName,
    Quantity,
    Resource,
    Rule,
    Seconds,
    Source,
)

Quantities = Annotated[dict[str, Quantity], Field(max_length=16)]


class ResourceClaim(Resource):
    """A dynamic resource claim of the pod, as in core/v1."""

    name: ObjectName
    request: Annotated[str, Field(max_length=63)] = ""


class Resources(Resource):
    """As core/v1 ResourceRequirements."""

    requests: Quantities = Field(default_factory=dict)
    limits: Quantities = Field(default_factory=dict)
    claims: Annotated[tuple[ResourceClaim, ...], Field(max_length=8)] = ()


class ScalingPolicy(Resource):
    """As autoscaling/v2 HPAScalingPolicy."""

    type: Literal["Pods", "Percent"]
    value: Annotated[int, Field(ge=1, le=10000)]
    period_seconds: Annotated[int, Field(ge=1, le=1800)]


class ScalingRules(Resource):
    """As autoscaling/v2 HPAScalingRules."""

    stabilization_window_seconds: Annotated[int, Field(ge=0, le=3600)] | None = None
    select_policy: Literal["Max", "Min", "Disabled"] = "Max"
    policies: Annotated[tuple[ScalingPolicy, ...], Field(max_length=8)] = ()
    tolerance: Decimal | None = None


class ScalingBehavior(Resource):
    """As autoscaling/v2 HorizontalPodAutoscalerBehavior."""

    scale_up: ScalingRules | None = None
    scale_down: ScalingRules | None = None


class Scaling(Resource):
    """How many replicas a model may have. Zero replicas only where minReplicas is 0."""

    min_replicas: Annotated[int, Field(ge=0, le=1000)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    target_per_replica: Annotated[
        Decimal, Field(description="Requests in the system that one replica is meant to carry.")
    ] = "2"
    behavior: ScalingBehavior | None = None

    rules = (
        Rule(
            field="maxReplicas",
            cel="self.maxReplicas >= self.minReplicas",
            message="maxReplicas is below minReplicas: raise it, or lower minReplicas",
            holds=lambda s: s.max_replicas >= s.min_replicas,
        ),
        Rule(
            field="targetPerReplica",
            cel="double(self.targetPerReplica) > 0.0",
            message='targetPerReplica must be above 0, such as "2"',
            holds=lambda s: float(s.target_per_replica) > 0,
        ),
    )


class Placement(Resource):
    """Where a model's replicas run: a Deployment of its own, or the nodes of a ModelPool."""

    pool: Annotated[ObjectName, Field(description="Name of a ModelPool in the same namespace.")]


class Pruning(Resource):
    """Static-budget token pruning. The artifact changes the model, the budget does not."""

    artifact: Source
    budget: Annotated[
        Decimal, Field(description="Mean share of tokens kept, above 0 up to 1; a default.")
    ] = "1"

    rules = (
        Rule(
            field="budget",
            cel="double(self.budget) > 0.0 && double(self.budget) <= 1.0",
            message='budget is the mean share of tokens kept: above 0 and at most 1, such as "0.6"',
            holds=lambda p: 0 < float(p.budget) <= 1,
        ),
    )


class ModelOverride(Resource):
    """What a workflow changes about one of its models."""

    enabled: Annotated[
        bool, Field(description="false leaves an optional model out, such as text_encoder_3.")
    ] = True
    source: Annotated[
        Source | None, Field(description="Other weights than the pipeline's own.")
    ] = None
    dtype: Annotated[Dtype | None, Field(description="Other than the pipeline's.")] = None
    attention_backend: Annotated[str, Field(max_length=32, pattern=r"^[a-z0-9_]*$")] = ""
    compile: Literal["none", "default", "max-autotune"] = "none"
    quantization: Annotated[str, Field(max_length=32, pattern=r"^[a-z0-9_]*$")] = ""
    tiling: Annotated[bool, Field(description="Decode in tiles, for little memory.")] = False
    resources: Resources | None = None
    scaling: Scaling | None = None
    placement: Placement | None = None
    pod_template: Annotated[
        Embedded | None, Field(description="Merged over the pods of this model.")
    ] = None
    drain_seconds: Seconds | None = None
    pruning: Pruning | None = None
