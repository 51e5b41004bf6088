# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""DiffusionWorkflow: typed inputs, a graph over models, outputs, a service level."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kubediffusion.api.serving import ModelOverride
from kubediffusion.api.types import (
    Anything,
    Conditions,
    Decimal,
    Description,
    DottedName,
    Dtype,
    Expression,
    Generation,
    Metadata,
    PartName,
    Reason,
    RelativePath,
    Resource,
    Rule,
    Seconds,
    SignedDecimal,
    Source,
    map_list,
    name_rule,
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

    name: Annotated[PartName, Field(description="As requests name it.")]
    source: Source


class Lora(Resource):
    """A LoRA that requests may use; nothing undeclared is ever loaded."""

    name: Annotated[PartName, Field(description="As requests name it.")]
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
    deadline_seconds: Annotated[
        int | None, Field(ge=1, le=86400, description="Deadline in seconds.")
    ] = None
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
    required: Annotated[bool | None, Field(description="A request must give it.")] = None
    default: Annotated[
        Anything | None, Field(description="A value, or an expression that begins with =.")
    ] = None
    minimum: Annotated[float | None, Field(description="The least that is taken.")] = None
    maximum: Annotated[float | None, Field(description="The most that is taken.")] = None
    multiple_of: Annotated[
        int | None, Field(ge=1, le=65536, description="A number must be a multiple of this.")
    ] = None
    max_length: Annotated[
        int | None, Field(ge=0, le=1 << 30, description="Characters of a text, bytes of an image.")
    ] = None
    requires: Annotated[
        DottedName | None, Field(description="This input means nothing without that one.")
    ] = None
    description: Annotated[Description, Field(description="For the clients' eyes.")] = ""

    rules = (
        Rule(
            field="maximum",
            cel="!has(self.minimum) || !has(self.maximum) || self.minimum <= self.maximum",
            message="maximum is below minimum",
            holds=lambda i: i.minimum is None or i.maximum is None or i.minimum <= i.maximum,
        ),
    )


class StepCache(Resource):
    """Steps that reuse what the blocks added at an earlier one."""

    method: Annotated[
        Literal["magcache", "first-block"],
        Field(description="How a step is told from one that may be left out."),
    ] = "magcache"
    threshold: Annotated[
        Decimal,
        Field(description="Relative error, summed over steps in a row, up to which they reuse."),
    ]
    ratios: Annotated[
        tuple[Decimal, ...],
        Field(
            max_length=1000,
            description="Of magcache: how much larger what the blocks add is at each step than at "
            "the one before, as calibrated for the model; the first is 1.",
        ),
    ] = ()
    max_skip_steps: Annotated[
        int, Field(ge=1, le=1000, description="Of magcache: most steps in a row that reuse.")
    ] = 3
    retention: Annotated[
        Decimal, Field(description="Of magcache: the share of first steps that never reuse.")
    ] = "0.2"

    rules = (
        Rule(
            field="threshold",
            cel="double(self.threshold) > 0.0",
            message='threshold is the error that a reused step may have: above 0, such as "0.06"',
            holds=lambda c: float(c.threshold) > 0,
        ),
        Rule(
            field="ratios",
            cel="self.method != 'magcache' || (has(self.ratios) && size(self.ratios) > 1)",
            message="magcache needs the ratios of the model, one for each step that it was "
            "calibrated at",
            holds=lambda c: c.method != "magcache" or len(c.ratios) > 1,
        ),
        Rule(
            field="retention",
            cel="double(self.retention) <= 1.0",
            message='retention is a share of the steps: at most 1, such as "0.2"',
            holds=lambda c: float(c.retention) <= 1,
        ),
    )


class Caching(Resource):
    """What may be reused, at the cost of exactness."""

    steps: Annotated[StepCache | None, Field(description="Between steps of a request.")] = None


class GraphNode(Resource):
    """One use of a model."""

    name: Annotated[DottedName, Field(description="Other nodes refer to it by this.")]
    model: Annotated[DottedName, Field(description="A role: text_encoder, transformer, vae.")]
    stage: Annotated[
        Literal["encode", "denoise", "decode", "encode_image"],
        Field(description="What the model does here."),
    ]
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
        Field(
            min_length=1,
            max_length=64,
            description="The uses of models, in any order.",
            json_schema_extra=map_list("name"),
        ),
    ]
    output: Annotated[
        str, Field(min_length=3, max_length=200, description="NODE.OUTPUT that is the result.")
    ]

    rules = (
        Rule(
            field="nodes",
            cel="",
            message="two nodes have one name: rename one",
            holds=lambda g: len({n.name for n in g.nodes}) == len(g.nodes),
        ),
    )


class WorkflowSpec(Resource):
    """What to serve, and how."""

    pipeline: Pipeline
    control_nets: Annotated[
        tuple[ControlNet, ...],
        Field(
            max_length=8,
            description="ControlNets that requests may use.",
            json_schema_extra=map_list("name"),
        ),
    ] = ()
    loras: Annotated[
        tuple[Lora, ...],
        Field(
            max_length=64,
            description="LoRAs that requests may use.",
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
    slo: Annotated[Slo | None, Field(description="How long a request may take.")] = None
    models: Annotated[
        dict[DottedName, ModelOverride],
        Field(
            max_length=32,
            description="Changes by role: text_encoder, transformer, vae, controlnet.NAME.",
        ),
    ] = Field(default_factory=dict[str, ModelOverride])
    inputs: Annotated[
        dict[DottedName, Input],
        Field(max_length=64, description="Defaults and bounds of what requests give, by name."),
    ] = Field(default_factory=dict[str, Input])
    caching: Annotated[
        Caching | None, Field(description="What may be reused, at the cost of exactness.")
    ] = None
    graph: Annotated[
        Graph | None, Field(description="The uses of models, where no preset has them.")
    ] = None
    strategy: Annotated[
        Literal["Rolling", "Replace"],
        Field(
            description="How a change of models takes over. Rolling: the new ones start beside "
            "the old ones, and take over when Ready. Replace: the old ones go first, so that no "
            "second accelerator is needed; requests are held meanwhile."
        ),
    ] = "Rolling"
    revision_history_limit: Annotated[
        int, Field(ge=0, le=100, description="Old revisions kept for rolling back.")
    ] = 10

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
        Rule(
            field="models",
            cel="!has(self.models) || self.models.all(m, !m.startsWith('controlnet.') || "
            "(has(self.controlNets) && self.controlNets.exists(c, 'controlnet.' + c.name == m)))",
            message="models.controlnet.NAME changes a ControlNet that controlNets does not "
            "declare: declare it, or remove the entry",
        ),
        Rule(
            field="models",
            cel="!has(self.models) || self.models.all(m, !m.startsWith('controlnet.') || "
            "!has(self.models[m].enabled) || self.models[m].enabled)",
            message="a ControlNet cannot be left out by enabled: false; remove it from controlNets",
        ),
        Rule(
            field="inputs",
            cel="!has(self.graph) || !has(self.inputs) || "
            "self.inputs.all(i, has(self.inputs[i].type))",
            message="an input of a graph needs its type: text, integer, number, flag or image",
        ),
        Rule(
            field="inputs",
            cel="!has(self.graph) || !has(self.inputs) || self.inputs.all(i, "
            "!has(self.inputs[i].requires) || self.inputs[i].requires in self.inputs)",
            message="an input requires another one that the workflow does not declare: "
            "declare it under inputs, or remove requires",
        ),
    )


class WorkflowModelStatus(Resource):
    """One model of the workflow, and the DiffusionModel that serves it."""

    role: Annotated[DottedName, Field(description="Its name in the workflow.")]
    model: Annotated[str, Field(max_length=63, description="Name of the DiffusionModel.")]
    ready: Annotated[bool, Field(description="Whether requests can use it.")] = False


class DrainingRevision(Resource):
    """A revision that is served no more."""

    revision: Annotated[str, Field(max_length=253, description="Name of its ControllerRevision.")]
    since: Annotated[
        str,
        Field(
            description="When the gateways were told to serve another one.",
            json_schema_extra={"format": "date-time"},
        ),
    ] = ""


class WorkflowStatus(Resource):
    """What is known of a workflow."""

    observed_generation: Generation = 0
    ready: Annotated[str, Field(max_length=16, description="Ready models of all, as 4/5.")] = ""
    reason: Reason = ""
    endpoint: Annotated[
        str, Field(max_length=1024, description="Where clients reach it: the gateway's address.")
    ] = ""
    revision: Annotated[
        str, Field(max_length=253, description="Name of the ControllerRevision that is served.")
    ] = ""
    latest_revision: Annotated[
        str, Field(max_length=253, description="Name of the newest; served when Ready.")
    ] = ""
    previous_revision: Annotated[
        str,
        Field(max_length=253, description="The first entry of draining."),
    ] = ""
    draining: Annotated[
        tuple[DrainingRevision, ...],
        Field(
            max_length=8,
            description="Revisions that were served before, the latest first. What only they have, "
            "models and LoRAs, stays until the requests that they took have ended.",
        ),
    ] = ()
    served_since: Annotated[
        str,
        Field(
            description="When the gateways were told to serve this revision.",
            json_schema_extra={"format": "date-time"},
        ),
    ] = ""
    models: Annotated[
        tuple[WorkflowModelStatus, ...],
        Field(max_length=32, description="The newest revision's models."),
    ] = ()
    conditions: Conditions = ()


class DiffusionWorkflow(Resource):
    """Text to image as a graph over shared models."""

    api_version: Literal["kubediffusion.io/v1alpha1"]
    kind: Literal["DiffusionWorkflow"]
    metadata: Metadata
    spec: WorkflowSpec
    status: WorkflowStatus | None = None

    rules = (name_rule(52, "its revisions are named <name>-<hash>"),)
