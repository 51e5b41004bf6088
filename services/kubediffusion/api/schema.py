# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""JSON Schema and CustomResourceDefinitions, generated from the types.

A CRD's schema is structural: references are inlined, nothing is open by accident, no ``anyOf``.
Rules between fields become CEL (``x-kubernetes-validations``).
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import yaml
from pydantic import BaseModel

from kubediffusion.api.load import bare_type
from kubediffusion.api.model import DiffusionModel, ModelPool
from kubediffusion.api.types import Resource
from kubediffusion.api.workflow import DiffusionWorkflow

GROUP = "kubediffusion.io"
VERSION = "v1alpha1"
PRESERVE = "x-kubernetes-preserve-unknown-fields"
# `helm show crds` joins the files as they are: without a line between two of them `kubectl apply`
# would take the last one alone, and say nothing.
HEADER = "---\n# Generated from services/kubediffusion/api by `make generate`; do not edit.\n"

Schema: TypeAlias = "dict[str, Any]"

# What JSON Schema has and a structural schema may not.
_DROPPED = {"additionalProperties", "patternProperties", "propertyNames", "const"}


@dataclass(frozen=True)
class Column:
    name: str
    path: str
    type: str = "string"
    wide: bool = False


@dataclass(frozen=True)
class Definition:
    """One custom resource as the API server is told of it."""

    kind: type[Resource]
    plural: str
    short: str
    columns: Sequence[Column]
    scale: bool = False


_AGE = Column("AGE", ".metadata.creationTimestamp", "date")
_REASON = Column("REASON", ".status.reason")
_DESIRED = Column("DESIRED", ".status.desiredReplicas", "integer")
_REPLICAS = Column("REPLICAS", ".status.replicas", "integer")
_MESSAGE = Column("MESSAGE", '.status.conditions[?(@.type=="Ready")].message', wide=True)
_READY = Column("READY", ".status.readyReplicas", "integer")

DEFINITIONS: Sequence[Definition] = (
    Definition(
        DiffusionWorkflow,
        "diffusionworkflows",
        "dwf",
        (
            Column("READY", ".status.ready"),
            _REASON,
            _AGE,
            Column("REVISION", ".status.revision", wide=True),
            Column("ENDPOINT", ".status.endpoint", wide=True),
            _MESSAGE,
        ),
    ),
    Definition(
        DiffusionModel,
        "diffusionmodels",
        "dmodel",
        (
            _READY,
            _REPLICAS,
            _DESIRED,
            _REASON,
            _AGE,
            Column("SOURCE", ".spec.source.uri", wide=True),
            Column("POOL", ".spec.placement.pool", wide=True),
            _MESSAGE,
        ),
        scale=True,
    ),
    Definition(
        ModelPool,
        "modelpools",
        "mpool",
        (_READY, _REPLICAS, _DESIRED, _REASON, _AGE, _MESSAGE),
        scale=True,
    ),
)


def json_schema(kind: type[BaseModel] = DiffusionWorkflow) -> Schema:
    """Draft 2020-12, for editors and for checks outside a cluster."""
    schema = _without_null(kind.model_json_schema())
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"https://{GROUP}/schema/{kind.__name__.lower()}.json",
        **schema,
    }


def crd(definition: Definition) -> Schema:
    """The CustomResourceDefinition, apiextensions.k8s.io/v1."""
    name = definition.kind.__name__
    subresources: Schema = {"status": {}}
    if definition.scale:
        subresources["scale"] = {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{definition.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": name,
                "listKind": f"{name}List",
                "plural": definition.plural,
                "singular": name.lower(),
                "shortNames": [definition.short],
                "categories": ["kubediffusion"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": subresources,
                    "additionalPrinterColumns": [
                        {"name": c.name, "type": c.type, "jsonPath": c.path}
                        | ({"priority": 1} if c.wide else {})
                        for c in definition.columns
                    ],
                    "schema": {"openAPIV3Schema": structural(definition.kind)},
                }
            ],
        },
    }


def files() -> Mapping[str, str]:
    """All that is generated: path in the repository -> text."""
    generated: dict[str, str] = {}
    for definition in DEFINITIONS:
        kind = definition.kind
        schema = json.dumps(json_schema(kind), indent=2) + "\n"
        generated[f"docs/schema/{kind.__name__.lower()}.json"] = schema
        text = yaml.safe_dump(crd(definition), sort_keys=False, width=100, allow_unicode=True)
        path = f"charts/kubediffusion/crds/{GROUP}_{definition.plural}.yaml"
        generated[path] = HEADER + text
    return generated


def structural(kind: type[BaseModel]) -> Schema:
    """The structural schema of a resource; its metadata is the API server's."""
    schema = _structural_object(kind)
    schema["properties"]["metadata"] = {"type": "object"}
    schema["properties"]["status"] = _without_defaults(schema["properties"]["status"])
    return schema


def _without_defaults(schema: Schema) -> Schema:
    """A status holds what was found out; what nobody said is not there."""
    result = {key: value for key, value in schema.items() if key != "default"}
    for key in ("properties", "items"):
        if key == "properties" and key in schema:
            children = cast("dict[str, Schema]", schema[key])
            result[key] = {name: _without_defaults(child) for name, child in children.items()}
        elif key in schema:
            result[key] = _without_defaults(schema[key])
    return result


def _structural_object(kind: type[BaseModel]) -> Schema:
    schema = kind.model_json_schema()
    properties: Schema = {}
    for name, info in kind.model_fields.items():
        key = info.alias or name
        given = _without_null(schema["properties"][key])
        properties[key] = _structural(given, bare_type(info.annotation))
    result: Schema = {"type": "object"}
    if schema.get("description"):
        result["description"] = schema["description"]
    if schema.get("required"):
        result["required"] = schema["required"]
    result["properties"] = properties
    rules = [r for r in kind.rules if r.cel] if issubclass(kind, Resource) else []
    if rules:
        result["x-kubernetes-validations"] = [
            {"rule": rule.cel, "message": rule.message, "fieldPath": f".{rule.field}"}
            for rule in rules
        ]
    return result


def _structural(schema: Schema, kind: Any) -> Schema:
    """`schema` of a field whose type is `kind`, without references."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        # A description at the field says more than the type's own.
        own = {k: v for k, v in schema.items() if k == "description"}
        return {**_structural_object(kind), **own}
    result: Schema = {
        key: value for key, value in schema.items() if key not in _DROPPED and key != "default"
    }
    if "const" in schema:
        result |= {"type": "string", "enum": [schema["const"]]}
    if schema.get("default") not in (None, "", [], {}):
        result["default"] = schema["default"]
    arguments = typing.get_args(kind)
    if "items" in schema:
        result["items"] = _structural(schema["items"], bare_type(arguments[0]))
    # What keys of a map look like, a structural schema cannot say; the types do.
    patterns: Schema = schema.get("patternProperties", {})
    values: list[object] = [schema.get("additionalProperties"), *patterns.values()]
    for value in values:
        if isinstance(value, dict):
            child = bare_type(arguments[-1])
            result["additionalProperties"] = _structural(cast(Schema, value), child)
    return result


def _without_null(schema: Any) -> Any:
    """An optional field may be left out; a null in a file is refused."""
    if isinstance(schema, list):
        return [_without_null(item) for item in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    result: Schema = {
        key: _without_null(value) for key, value in cast(Schema, schema).items() if key != "title"
    }
    if "patternProperties" in result:
        result["additionalProperties"] = False
    choices = result.get("anyOf")
    if isinstance(choices, list):
        kept = [choice for choice in cast("list[Schema]", choices) if choice != {"type": "null"}]
        if len(kept) == 1:
            del result["anyOf"]
            result = {**kept[0], **result}
            if result.get("default", 0) is None:
                del result["default"]
    return result
