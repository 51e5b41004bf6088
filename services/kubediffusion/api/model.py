# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""DiffusionModel, one for each identity, and ModelPool, nodes that host several models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kubediffusion.api.serving import (
    POOLED,
    AttentionBackend,
    Compile,
    Drain,
    Placement,
    Quantization,
    Resources,
    Scaling,
    Tiling,
    quantity,
)
from kubediffusion.api.types import (
    Conditions,
    Count,
    DottedName,
    Dtype,
    Embedded,
    Generation,
    Metadata,
    ObjectName,
    PartName,
    Reason,
    RelativePath,
    Resource,
    Rule,
    Source,
    name_rule,
)

Name = Annotated[str, Field(max_length=63)]
Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Bytes = Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})]
Selector = Annotated[
    str, Field(max_length=1024, description="Of its pods, as HPA and kubectl want it.")
]


class ModelLora(Resource):
    """A LoRA that requests may use with this model; nothing undeclared is ever loaded."""

    name: Annotated[PartName, Field(description="As requests name it.")]
    source: Source
    weight_name: Annotated[
        RelativePath, Field(description="The file, where the source has more than one.")
    ] = ""


class ModelPruning(Resource):
    """Static-budget token pruning; the budget is chosen by each request."""

    artifact: Annotated[Source, Field(description="What the trainer wrote; merged at load.")]


# Fields with a default are always there in a cluster.
_PLAIN = ("family", "component", "dtype", "compile", "tiling")
_OPTIONAL = ("className", "attentionBackend", "quantization")


def _same(path: str) -> str:
    """CEL: an optional text did not change. Left out, it counts as empty."""
    new, old = f"self.{path}", f"oldSelf.{path}"
    return (
        f"(has({new}) && has({old}) ? {new} == {old} : "
        f"(!has({new}) || {new} == '') && (!has({old}) || {old} == ''))"
    )


def _unchanged(field: str, cel: str) -> Rule:
    """What a model's identity is made of cannot change."""
    message = f"{field} is part of the model's identity and cannot change: make another model"
    return Rule(field=field, cel=cel, message=message)


IDENTITY_RULES = (
    *(_unchanged(field, f"self.{field} == oldSelf.{field}") for field in _PLAIN),
    *(_unchanged(field, _same(field)) for field in _OPTIONAL),
    _unchanged(
        "source",
        " && ".join(
            ["self.source.uri == oldSelf.source.uri"]
            + [_same(f"source.{part}") for part in ("revision", "subfolder", "variant")]
        ),
    ),
    _unchanged(
        "pruning",
        "has(self.pruning) == has(oldSelf.pruning) && "
        "(!has(self.pruning) || self.pruning.artifact == oldSelf.pruning.artifact)",
    ),
)


class ModelSpec(Resource):
    """One loadable network and how it is served. What changes arithmetic cannot be changed."""

    family: Annotated[Literal["sd3"], Field(description="The architecture family.")]
    component: Annotated[
        DottedName, Field(description="Its place in a pipeline: text_encoder_3, transformer, vae.")
    ]
    source: Source
    class_name: Annotated[
        str,
        Field(max_length=128, pattern=r"^[A-Za-z0-9_]*$", description="As in model_index.json."),
    ] = ""
    dtype: Annotated[Dtype, Field(description="Of weights and arithmetic.")] = "float32"
    attention_backend: AttentionBackend = ""
    compile: Compile = "none"
    quantization: Quantization = ""
    tiling: Tiling = False
    pruning: Annotated[
        ModelPruning | None, Field(description="Token pruning of a diffusion transformer.")
    ] = None
    loras: Annotated[
        tuple[ModelLora, ...],
        Field(max_length=1024, description="What its workflows declare, taken together."),
    ] = ()
    replicas: Annotated[
        int | None,
        Field(
            ge=0,
            le=1000,
            description="Set through the scale subresource by its one owner: the built-in "
            "autoscaler, HPA, KEDA or kubectl scale. Clamped to scaling's bounds, unless "
            "scaling.mode is external. Means nothing for a ControlNet, which is on its "
            "transformer's nodes.",
        ),
    ] = None
    resources: Annotated[Resources | None, Field(description="Of a node's container.")] = None
    scaling: Annotated[
        Scaling | None,
        Field(description="How many replicas. Left out: one, or what kubectl scale says."),
    ] = None
    placement: Annotated[
        Placement | None, Field(description="Left out: a Deployment of its own.")
    ] = None
    pod_template: Annotated[
        Embedded | None,
        Field(
            description="A PodTemplateSpec merged over the pods of this model: containers (the "
            "node's is named node), volumes and env by name."
        ),
    ] = None
    drain_seconds: Drain = 120

    rules = (POOLED, *IDENTITY_RULES)


class ModelUser(Resource):
    """A workflow that uses the model."""

    name: Annotated[ObjectName, Field(description="Of the DiffusionWorkflow.")]
    role: Annotated[DottedName, Field(description="The model's name in that workflow.")]


class Failure(Resource):
    """The last failure of a node that hosts the model."""

    reason: Annotated[str, Field(max_length=64, description="One word, for programs.")]
    message: Annotated[str, Field(max_length=4096, description="What to do about it.")] = ""
    exit_code: Annotated[int | None, Field(description="Of the node's process.")] = None
    time: Annotated[Time, Field(description="When it happened.")]


class ScalingDecision(Resource):
    """One decision of the autoscaler, with the numbers behind it."""

    time: Annotated[Time, Field(description="When it was taken.")]
    from_replicas: Annotated[Count, Field(description="Replicas before.")]
    to_replicas: Annotated[Count, Field(description="Replicas after.")]
    reason: Annotated[str, Field(max_length=64, description="One word, for programs.")]
    message: Annotated[str, Field(max_length=1024, description="The numbers behind it.")] = ""


class ModelStatus(Resource):
    """What is known of a model."""

    observed_generation: Generation = 0
    identity: Annotated[Name, Field(description="The hash that its name has to be.")] = ""
    digest: Annotated[str, Field(max_length=128, description="Of the weight files.")] = ""
    nbytes: Annotated[Bytes, Field(description="What it takes on a node.")] = 0
    replicas: Annotated[Count, Field(description="Pods, or nodes of its pool.")] = 0
    ready_replicas: Annotated[Count, Field(description="Those that can serve it.")] = 0
    desired_replicas: Annotated[Count, Field(description="As many as there should be.")] = 0
    selector: Selector = ""
    reason: Reason = ""
    referenced_by: Annotated[
        tuple[ModelUser, ...], Field(max_length=256, description="Its workflows.")
    ] = ()
    hosted_by: Annotated[
        tuple[Name, ...],
        Field(
            max_length=256,
            description="Models on whose nodes it runs, for want of nodes of its own; of a "
            "ControlNet.",
        ),
    ] = ()
    scaling_history: Annotated[
        tuple[ScalingDecision, ...],
        Field(max_length=20, description="The autoscaler's last decisions, newest first."),
    ] = ()
    last_failure: Annotated[
        Failure | None, Field(description="Of its nodes; stays when it is over.")
    ] = None
    conditions: Conditions = ()


class DiffusionModel(Resource):
    """One model, served to all workflows that use it."""

    api_version: Literal["kubediffusion.io/v1alpha1"]
    kind: Literal["DiffusionModel"]
    metadata: Metadata
    spec: ModelSpec
    status: ModelStatus | None = None

    rules = (name_rule(40, "it names its Deployment, Service and pods", letter=True),)


class PoolSpec(Resource):
    """Like nodes, one accelerator each, that host several models."""

    replicas: Annotated[int, Field(ge=0, le=1000, description="Nodes of the pool.")] = 1
    memory_limit: Annotated[
        str,
        Field(
            max_length=32,
            pattern=r"^([0-9]+(\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?)?$",
            description="What a node's models may take of its accelerator, such as 20Gi. Left "
            "out: no limit is known, and what does not fit is found out by loading it.",
        ),
    ] = ""
    resources: Annotated[Resources | None, Field(description="Of a node's container.")] = None
    pod_template: Annotated[
        Embedded | None,
        Field(
            description="A PodTemplateSpec merged over the pods of this pool: containers (the "
            "node's is named node), volumes and env by name."
        ),
    ] = None
    drain_seconds: Drain = 120

    rules = (
        Rule(
            field="memoryLimit",
            cel="!has(self.memoryLimit) || self.memoryLimit == '' || "
            "quantity(self.memoryLimit).isGreaterThan(quantity('0'))",
            message="memoryLimit 0 leaves no room for a model: write what a node's models may "
            "take, such as 20Gi, or leave it out",
            holds=lambda p: not p.memory_limit or quantity(p.memory_limit) > 0,
        ),
    )


class PlannedModel(Resource):
    """A model of the plan and the nodes that host it."""

    model: Annotated[Name, Field(description="Name of the DiffusionModel.")]
    nodes: Annotated[
        tuple[ObjectName, ...], Field(max_length=1000, description="Names of the pool's pods.")
    ] = ()


class PoolStatus(Resource):
    """What is known of a pool, and the plan that its nodes carry out."""

    observed_generation: Generation = 0
    replicas: Annotated[Count, Field(description="Its pods.")] = 0
    ready_replicas: Annotated[Count, Field(description="Its pods that are ready.")] = 0
    desired_replicas: Annotated[Count, Field(description="As many as there should be.")] = 0
    selector: Selector = ""
    reason: Reason = ""
    plan_generation: Annotated[
        int, Field(ge=0, description="Counts the plans; nodes refuse an older one.")
    ] = 0
    plan_hash: Annotated[str, Field(max_length=64, description="Of all that nodes are told.")] = ""
    plan_time: Annotated[Time, Field(description="Since when this is the plan.")] = ""
    plan: Annotated[
        tuple[PlannedModel, ...], Field(max_length=1024, description="Which model on which nodes.")
    ] = ()
    last_failure: Annotated[
        Failure | None, Field(description="Of its pods; stays when it is over.")
    ] = None
    conditions: Conditions = ()


class ModelPool(Resource):
    """Model nodes that several models share."""

    api_version: Literal["kubediffusion.io/v1alpha1"]
    kind: Literal["ModelPool"]
    metadata: Metadata
    spec: PoolSpec
    status: PoolStatus | None = None

    rules = (name_rule(40, "pool-<name> names its Deployment, Service and pods"),)
