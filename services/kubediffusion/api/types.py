# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What all custom resources are made of: the base class, bounded strings, rules between fields.

Every string, list and map has a bound, so that the API server can price the CEL rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

API_VERSION = "kubediffusion.io/v1alpha1"

Dtype = Literal["float32", "bfloat16", "float16"]

# RFC 1123: what Kubernetes takes as the name of an object.
ObjectName = Annotated[
    str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
]
# ControlNets and LoRAs: a part of input names such as control.<name>.scale.
PartName = Annotated[
    str, Field(min_length=1, max_length=40, pattern=r"^[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?$")
]
# Roles, graph nodes, inputs, ports: words joined by dots.
DottedName = Annotated[
    str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*$")
]
Uri = Annotated[
    str, Field(min_length=8, max_length=1024, pattern=r"^(hf|builtin|file)://[^\s?#]+$")
]
# Inside a source: no way up, no absolute path.
RelativePath = Annotated[
    str,
    Field(
        max_length=256,
        pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*)?$",
    ),
]
Revision = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9._/-]*$")]
Variant = Annotated[str, Field(max_length=32, pattern=r"^[A-Za-z0-9_-]*$")]
Quantity = Annotated[
    str, Field(max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")
]
# Kubernetes objects carry no floats: a decimal is written in quotes.
Decimal = Annotated[str, Field(max_length=16, pattern=r"^[0-9]+(\.[0-9]+)?$")]
SignedDecimal = Annotated[str, Field(max_length=16, pattern=r"^-?[0-9]+(\.[0-9]+)?$")]
Expression = Annotated[str, Field(min_length=1, max_length=512)]
Description = Annotated[str, Field(max_length=1024)]
Seconds = Annotated[int, Field(ge=0, le=86400)]
Anything = Annotated[Any, Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]
# A fragment of a Kubernetes object, which Kubernetes checks when it is used.
Embedded = Annotated[
    dict[str, Any],
    Field(json_schema_extra={"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
]


def map_list(key: str) -> dict[str, Any]:
    """Extra schema of a list whose items are told apart by `key`."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


def _always(value: object) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """A rule between fields: `holds` here, `cel` in the cluster. `field` is one of the type's.

    Without `cel` the API server sees to it by other means, such as a list's keys. Without `holds`
    it is either a rule between two versions of an object (`oldSelf`), which only a cluster has, or
    `workflow.resolve` says it and names the very field.
    """

    field: str
    cel: str
    message: str
    holds: Callable[[Any], bool] = _always


class Resource(BaseModel):
    """Base of every type in a custom resource: camelCase, immutable, nothing unknown."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
    )
    rules: ClassVar[tuple[Rule, ...]] = ()


class Metadata(BaseModel):
    """Kubernetes' own: only what is read here is typed, the rest is kept as it is."""

    model_config = ConfigDict(alias_generator=to_camel, extra="allow", frozen=True, strict=True)

    name: ObjectName
    namespace: Annotated[str, Field(max_length=63)] = ""
    labels: dict[str, str] = Field(default_factory=dict[str, str])
    annotations: dict[str, str] = Field(default_factory=dict[str, str])


def name_rule(limit: int, why: str, *, letter: bool = False) -> Rule:
    """The name of an object that other names are made from: a label of at most `limit`."""
    first = "[a-z]" if letter else "[a-z0-9]"
    pattern = f"^{first}([-a-z0-9]*[a-z0-9])?$"
    begin = "begins with a letter" if letter else "begins with a letter or digit"
    return Rule(
        field="metadata",
        cel=f"self.metadata.name.size() <= {limit} && self.metadata.name.matches('{pattern}')",
        message=f"metadata.name may have at most {limit} lower-case letters, digits and dashes, "
        f"and {begin}: {why}",
        holds=lambda o: (
            len(o.metadata.name) <= limit and re.match(pattern, o.metadata.name) is not None
        ),
    )


class Source(Resource):
    """Where weights come from."""

    uri: Annotated[
        Uri,
        Field(
            description="hf://ORG/NAME (the Hugging Face hub), builtin://NAME (shipped with "
            "KubeDiffusion) or file://PATH (a folder; in a cluster a mounted volume)."
        ),
    ]
    revision: Annotated[
        Revision, Field(description="Branch, tag or commit of an hf:// source. Pin a commit.")
    ] = ""
    subfolder: Annotated[RelativePath, Field(description="Folder inside the source.")] = ""
    variant: Annotated[
        Variant, Field(description="Weight files with this infix, such as fp16.")
    ] = ""


class Condition(Resource):
    """As metav1.Condition."""

    type: Annotated[str, Field(min_length=1, max_length=316, description="What it is about.")]
    status: Annotated[
        Literal["True", "False", "Unknown"], Field(description="Whether it is the case.")
    ]
    reason: Annotated[
        str, Field(min_length=1, max_length=1024, description="One word for why, for programs.")
    ]
    message: Annotated[
        str, Field(max_length=32768, description="What is wrong and what to do, for people.")
    ] = ""
    last_transition_time: Annotated[
        str,
        Field(description="When status last changed.", json_schema_extra={"format": "date-time"}),
    ]
    observed_generation: Annotated[
        int, Field(ge=0, description="The metadata.generation that this is said of.")
    ] = 0


Conditions = Annotated[
    tuple[Condition, ...],
    Field(
        max_length=16,
        description="What is the case, one entry for each type.",
        json_schema_extra=map_list("type"),
    ),
]
Count = Annotated[int, Field(ge=0, le=100000)]
Generation = Annotated[
    int, Field(ge=0, description="The metadata.generation that this status is of.")
]
# Why an object is not ready, or Ready: a condition's reason as a printer column.
Reason = Annotated[str, Field(max_length=64, description="One word: Ready, or why not.")]
