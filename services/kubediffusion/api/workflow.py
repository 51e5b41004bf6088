# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""DiffusionWorkflow: typed inputs, a graph over models, outputs, a service level."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kubediffusion.api.serving import ModelOverride
from kubediffusion.api.types import (
    Anything,
    Condition,
    Decimal,
    Description,
    DottedName,
    Dtype,
    Expression,
    Metadata,
    PartName,
    RelativePath,
    Resource,
    Rule,
    Seconds,
    SignedDecimal,
    Source,
    map_list,
)


class Pipeline(Resource):
    """The pipeline a workflow is built from: a folder in diffusers' layout."""

    preset: Annotated[
        Literal["StableDiffusion3"] | None,
        Field(description="Models, graph and inputs come from the preset."),
    ] = None
    family: Annotated[
        Literal["sd3"] | None,
        Field(description="In place of preset, for a workflow that writes its graph out."),
    ] = None
    source: Source
    dtype: Annotated[Dtype, Field(description="Of all models; models.<role>.dtype overrides.")] = (
        "float32"
    )

    rules = (
        Rule(
            field="preset",
            cel="has(self.preset) != has(self.family)",
            message="give preset (graph and inputs come with it) or family (with spec.graph)",
            holds=lambda p: (p.preset is None) != (p.family is None),
        ),
        Rule(
            field="source",
            cel="!has(self.source.subfolder) || self.source.subfolder == ''",
            message="a pipeline lies at the top of its source: put the folder into the uri",
            holds=lambda p: not p.source.subfolder,
        ),
    )


class ControlNet(Resource):
    """A ControlNet that requests may use, by the input control.<name>."""

    name: PartName
    source: Source


class Lora(Resource):
    """A LoRA that requests may use; nothing undeclared is ever loaded."""

    name: PartName
    source: Source
    weight_name: Annotated[
        RelativePath, Field(description="The file, where the source has more than one.")
    ] = ""
    scale: Annotated[
        SignedDecimal, Field(description="Where a request names no scale; 0 is off.")
    ] = "0"

    rules = (
        Rule(
            field="scale",
            cel="double(self.scale) >= -10.0 && double(self.scale) <= 10.0",
            message="scale must lie in -10 to 10",
            holds=lambda lora: -10 <= float(lora.scale) <= 10,
        ),
    )


class Slo(Resource):
    """The service level: how long a request may take when its client names no deadline."""

    latency_scale: Annotated[
        Decimal | None, Field(description="Deadline as a multiple of the solo latency.")
    ] = None
    deadline_seconds: Annotated[int, Field(ge=1, le=86400)] | None = None
    activation_timeout_seconds: Annotated[
        Seconds, Field(description="How long a request waits for models that have no replica.")
    ] = 300

    rules = (
        Rule(
            field="deadlineSeconds",
            cel="!(has(self.latencyScale) && has(self.deadlineSeconds))",
            message="give latencyScale or deadlineSeconds, not both",
            holds=lambda s: s.latency_scale is None or s.deadline_seconds is None,
        ),
        Rule(
            field="latencyScale",
            cel="!has(self.latencyScale) || double(self.latencyScale) >= 1.0",
            message='latencyScale is a multiple of the solo latency: at least "1.0"',
            holds=lambda s: s.latency_scale is None or float(s.latency_scale) >= 1,
        ),
    )


InputTypeName = Literal["text", "integer", "number", "flag", "image"]


class Input(Resource):
    """An input's default and bounds. A preset's inputs are narrowed; a graph's are declared."""

    type: Annotated[
        InputTypeName | None, Field(description="Needed for an input that no preset declares.")
    ] = None
    required: bool | None = None
    default: Annotated[
        Anything | None, Field(description="A value, or an expression that begins with =.")
    ] = None
    minimum: float | None = None
    maximum: float | None = None
    multiple_of: Annotated[int, Field(ge=1, le=65536)] | None = None
    max_length: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    requires: Annotated[
        DottedName | None, Field(description="This input means nothing without that one.")
    ] = None
    description: Description = ""

    rules = (
        Rule(
            field="maximum",
            cel="!has(self.minimum) || !has(self.maximum) || self.minimum <= self.maximum",
            message="maximum is below minimum",
            holds=lambda i: i.minimum is None or i.maximum is None or i.minimum <= i.maximum,
        ),
    )


class StepCache(Resource):
    """Reuse of block outputs between steps."""

    threshold: Annotated[Decimal, Field(description="Relative change below which a step reuses.")]


class Caching(Resource):
    """What may be reused, at the cost of exactness."""

    steps: StepCache | None = None


class GraphNode(Resource):
    """One use of a model."""

    name: DottedName
    model: DottedName
    stage: Literal["encode", "denoise", "decode", "encode_image"]
    inputs: Annotated[
        dict[DottedName, Anything],
        Field(
            max_length=64,
            description="Port: $inputs.NAME, NODE.OUTPUT, a constant, an expression that begins "
            "with =, or a list of references of which the first that is there is taken.",
        ),
    ] = Field(default_factory=dict[str, Any])
    when: Annotated[
        Expression | None, Field(description="The node is left out where this is false.")
    ] = None


class Graph(Resource):
    """Named nodes and the port that is the workflow's result."""

    nodes: Annotated[
        tuple[GraphNode, ...],
        Field(min_length=1, max_length=64, json_schema_extra=map_list("name")),
    ]
    output: Annotated[str, Field(min_length=3, max_length=200)]

    rules = (
        Rule(
            field="nodes",
            cel="",
            message="two nodes have one name: rename one",
            holds=lambda g: len({n.name for n in g.nodes}) == len(g.nodes),
        ),
    )


class WorkflowSpec(Resource):
    pipeline: Pipeline
    control_nets: Annotated[
        tuple[ControlNet, ...],
        Field(
            max_length=8,
            json_schema_extra=map_list("name"),
        ),
    ] = ()
    loras: Annotated[
        tuple[Lora, ...],
        Field(
            max_length=64,
            json_schema_extra=map_list("name"),
        ),
    ] = ()
    numerics: Annotated[
        Literal["exact", "fast"],
        Field(
            description="exact: byte-identical to diffusers. fast: compiled graphs, batching "
            "across requests and split CFG are allowed."
        ),
    ] = "exact"
    slo: Slo | None = None
    models: Annotated[dict[DottedName, ModelOverride], Field(max_length=32)] = Field(
        default_factory=dict[str, ModelOverride]
    )
    inputs: Annotated[dict[DottedName, Input], Field(max_length=64)] = Field(
        default_factory=dict[str, Input]
    )
    caching: Caching | None = None
    graph: Graph | None = None

    rules = (
        Rule(
            field="controlNets",
            cel="",
            message="two ControlNets have one name: rename one",
            holds=lambda s: len({c.name for c in s.control_nets}) == len(s.control_nets),
        ),
        Rule(
            field="loras",
            cel="",
            message="two LoRAs have one name: rename one",
            holds=lambda s: len({x.name for x in s.loras}) == len(s.loras),
        ),
        Rule(
            field="graph",
            cel="has(self.graph) == has(self.pipeline.family)",
            message="a graph goes with pipeline.family, a preset brings its own graph: "
            "give preset without graph, or family and graph",
            holds=lambda s: (s.graph is not None) == (s.pipeline.family is not None),
        ),
    )


class WorkflowModelStatus(Resource):
    """One model of the workflow, and the DiffusionModel that serves it."""

    role: DottedName
    model: Annotated[str, Field(max_length=63)]
    ready: bool = False


class WorkflowStatus(Resource):
    observed_generation: Annotated[int, Field(ge=0)] = 0
    ready: Annotated[str, Field(max_length=16, description="Ready models of all, as 4/5.")] = ""
    reason: Annotated[str, Field(max_length=64)] = ""
    endpoint: Annotated[str, Field(max_length=1024)] = ""
    revision: Annotated[str, Field(max_length=253)] = ""
    models: Annotated[tuple[WorkflowModelStatus, ...], Field(max_length=32)] = ()
    conditions: Annotated[
        tuple[Condition, ...],
        Field(
            max_length=16,
            json_schema_extra=map_list("type"),
        ),
    ] = ()


class DiffusionWorkflow(Resource):
    """Text to image as a graph over shared models."""

    api_version: Literal["kubediffusion.io/v1alpha1"]
    kind: Literal["DiffusionWorkflow"]
    metadata: Metadata
    spec: WorkflowSpec
    status: WorkflowStatus | None = None
