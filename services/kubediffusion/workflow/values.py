# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The values that this room hands to the others."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from kubediffusion.workflow.graph import Graph

# What an input or a constant port can hold; bytes are an encoded image.
Value: TypeAlias = "str | int | float | bool | bytes"
# What nodes tell about their models, by role: {"vae": {"vae_scale_factor": 8}, ...}.
Facts: TypeAlias = Mapping[str, Mapping[str, "str | int | float | bool"]]

SEED_LIMIT = 1 << 63  # seeds are int64 on the wire: 0 to 2**63 - 1


class InputType(enum.StrEnum):
    """Types of a request's inputs, and of ports that a request's inputs can feed."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    FLAG = "flag"
    IMAGE = "image"  # encoded bytes: PNG, JPEG, WebP


@dataclass(frozen=True, slots=True)
class PipelineIndex:
    """What a pipeline's model_index.json says: class names by component, absent ones left out."""

    components: Mapping[str, str]
    commit: str = ""


@dataclass(frozen=True, slots=True)
class LoraDecl:
    """A LoRA that requests of a workflow may use; `scale` where they name none (0: off)."""

    name: str
    uri: str
    revision: str = ""
    subfolder: str = ""
    weight_name: str = ""
    scale: float = 0.0


@dataclass(frozen=True, slots=True)
class LoraUse:
    """A LoRA as one request uses it; the fields of LoraUse in node.proto."""

    name: str
    uri: str
    revision: str
    scale: float
    subfolder: str
    weight_name: str


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model as a node has to load it; the fields of ModelSpec in node.proto, and its role."""

    role: str
    identity: str
    family: str
    component: str
    uri: str
    revision: str
    subfolder: str
    variant: str
    dtype: str
    class_name: str
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    loras: tuple[LoraDecl, ...] = ()


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a workflow. Bounds include their ends."""

    name: str
    type: InputType
    required: bool = False
    default: Value | None = None
    # An expression for the default, which needs facts of the models: the size of the picture.
    default_expression: str = ""
    minimum: float | None = None
    maximum: float | None = None
    multiple_of: int | None = None
    # Characters of a text, bytes of an image.
    max_length: int | None = None
    # This input means nothing without that one.
    requires: str = ""
    description: str = ""


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds; with neither scale nor deadline a request may take as long as it takes."""

    latency_scale: float | None = None
    deadline_seconds: float | None = None
    activation_timeout_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class Pruning:
    """Of a workflow whose transformer is pruned: mean keep ratios, where 1 is all tokens."""

    budget: float  # where a request names none
    minimum: float = 0.0
    maximum: float = 1.0


@dataclass(frozen=True, slots=True)
class StepCache:
    """Of a workflow whose denoiser leaves steps out; the fields of `api.workflow.StepCache`."""

    method: str
    threshold: float
    ratios: tuple[float, ...]
    max_skip_steps: int
    retention: float


@dataclass(frozen=True, slots=True)
class ResolvedWorkflow:
    """A workflow whose sources are pinned and whose graph is checked: ready to expand requests."""

    name: str
    family: str
    models: Mapping[str, ModelRef]
    graph: Graph
    inputs: Mapping[str, InputSpec]
    loras: Mapping[str, LoraDecl]
    slo: Slo
    numerics: str  # exact, fast
    pruning: Pruning | None = None  # None: the pipeline's own dense model
    step_cache: StepCache | None = None  # None: every step is computed


@dataclass(frozen=True, slots=True)
class Bound:
    """One request's inputs, checked and completed. Absent optional inputs are not in `values`."""

    values: Mapping[str, Value]
    loras: tuple[LoraUse, ...] = ()

    @property
    def seed(self) -> int:
        """Seed of the first image; 0 for a workflow without randomness."""
        return int(self.values.get("seed", 0))

    def image(self, index: int) -> Bound:
        """The same request for the image `index` of n: its seed is s + index."""
        if not index:
            return self
        return replace(self, values={**self.values, "seed": (self.seed + index) % SEED_LIMIT})


@dataclass(frozen=True, slots=True)
class Constant:
    """A value; `input` is the request's input it came from, so that an error can name it."""

    value: Value
    input: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class PortRef:
    task: str
    port: str

    def __str__(self) -> str:
        return f"{self.task}.{self.port}"


@dataclass(frozen=True, slots=True)
class Task:
    """One stage of one request. `outputs` are the ports that somebody reads."""

    name: str
    role: str
    model: str  # identity
    stage: str
    inputs: Mapping[str, Constant | PortRef]
    outputs: tuple[str, ...]
    loras: tuple[LoraUse, ...] = ()
    steps: int = 0  # denoising steps that will run; 0 for other stages
    controlnets: tuple[tuple[str, str], ...] = ()  # (name, identity), in the workflow's order
