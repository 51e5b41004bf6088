# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The generated JSON Schema, the CRDs and the types say the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from kubediffusion.api import DiffusionModel, ModelPool, load, load_workflow, schema
from kubediffusion.errors import InvalidWorkflow

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(schema.json_schema())
OTHERS = {kind.__name__: kind for kind in (DiffusionModel, ModelPool)}

GOOD: dict[str, Any] = {
    "apiVersion": "kubediffusion.io/v1alpha1",
    "kind": "DiffusionWorkflow",
    "metadata": {"name": "w", "labels": {"team": "a"}},
    "spec": {
        "pipeline": {"preset": "StableDiffusion3", "source": {"uri": "hf://org/name"}},
        "controlNets": [{"name": "edges", "source": {"uri": "file:///weights"}}],
        "loras": [{"name": "ink", "source": {"uri": "builtin://x"}, "scale": "-0.5"}],
        "slo": {"latencyScale": "2.0"},
        "numerics": "fast",
        "models": {
            "transformer": {
                "dtype": "bfloat16",
                "resources": {"limits": {"nvidia.com/gpu": "1", "memory": "16Gi"}},
                "scaling": {"minReplicas": 0, "maxReplicas": 4},
                "podTemplate": {"spec": {"tolerations": [{"operator": "Exists"}]}},
            },
            "text_encoder_3": {"enabled": False},
            "controlnet.edges": {"placement": {"pool": "small"}},
        },
        "inputs": {"steps": {"default": 20, "maximum": 50}, "guidance": {"default": 4.5}},
    },
}

MISSING = object()
BAD: dict[str, tuple[str, object]] = {
    "no kind": ("kind", MISSING),
    "another kind": ("kind", "Deployment"),
    "an unknown field": ("spec.pipline", {}),
    "a name that is no label": ("metadata.name", "Not_A_Label"),
    "a scheme that is not known": ("spec.pipeline.source.uri", "s3://bucket"),
    "a way out of the source": ("spec.controlNets.0.source.subfolder", "../../etc"),
    "an unknown preset": ("spec.pipeline.preset", "StableDiffusion9"),
    "a number for a decimal": ("spec.loras.0.scale", 0.5),
    "a decimal that is none": ("spec.slo.latencyScale", "fast"),
    "too many replicas": ("spec.models.transformer.scaling.maxReplicas", 100000),
    "a quantity that is none": ("spec.models.transformer.resources.limits.memory", "lots"),
    "a flag that is text": ("spec.models.text_encoder_3.enabled", "no"),
    "a role that is no name": ("spec.models", {"text encoder": {}}),
    "a bound that is text": ("spec.inputs.steps.maximum", "50"),
    "an unknown dtype": ("spec.models.transformer.dtype", "int3"),
    "a list for a map": ("spec.inputs", []),
}


def changed(document: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    document = copy.deepcopy(document)
    *parents, last = path.split(".")
    target: Any = document
    for part in parents:
        target = target[int(part) if isinstance(target, list) else part]
    if value is MISSING:
        del target[last]
    else:
        target[last] = value
    return document


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_keep_to_the_schema_and_the_types(path: Path) -> None:
    text = path.read_text()
    document = yaml.safe_load(text)
    other = OTHERS.get(document["kind"])
    if other is None:
        VALIDATOR.validate(document)
        load_workflow(text)
    else:
        jsonschema.Draft202012Validator(schema.json_schema(other)).validate(document)
        load(other, text)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


def test_a_full_document_is_good_for_both() -> None:
    VALIDATOR.validate(GOOD)
    load_workflow(yaml.safe_dump(GOOD))


@pytest.mark.parametrize(("path", "value"), BAD.values(), ids=BAD.keys())
def test_a_bad_document_is_bad_for_both(path: str, value: object) -> None:
    document = changed(GOOD, path, value)
    assert not VALIDATOR.is_valid(document)
    with pytest.raises(InvalidWorkflow):
        load_workflow(yaml.safe_dump(document))


def nodes(node: object, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema inside a CRD's."""
    if not isinstance(node, dict):
        return
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        yield from nodes(node.get(key), f"{path}[]")


@pytest.mark.parametrize("definition", schema.DEFINITIONS, ids=lambda d: d.kind.__name__)
def test_crds_are_structural_and_bounded(definition: schema.Definition) -> None:
    allowed = {
        "type", "description", "properties", "required", "items", "additionalProperties", "enum",
        "default", "minimum", "maximum", "exclusiveMinimum", "multipleOf", "minLength",
        "maxLength", "pattern", "minItems", "maxItems", "maxProperties", "format",
    }  # fmt: skip
    for path, node in nodes(schema.structural(definition.kind)):
        extensions = {key for key in node if key.startswith("x-kubernetes-")}
        assert set(node) - extensions <= allowed, path
        assert "type" in node or node.get(schema.PRESERVE) is True, path
        if node.get("type") == "string":
            assert "maxLength" in node or "enum" in node or "format" in node, path
        if node.get("type") == "array":
            assert "maxItems" in node, path
        if "additionalProperties" in node:
            assert "maxProperties" in node, path
            assert "properties" not in node, path
        for rule in node.get("x-kubernetes-validations", ()):
            assert rule["message"], path
            name = rule["fieldPath"].removeprefix(".")
            assert name in node["properties"], path


def test_models_and_pools_have_a_scale_subresource() -> None:
    scaled = {
        definition.plural
        for definition in schema.DEFINITIONS
        if "scale" in schema.crd(definition)["spec"]["versions"][0]["subresources"]
    }
    assert scaled == {"diffusionmodels", "modelpools"}


@pytest.mark.parametrize("path", schema.files())
def test_generated_files_equal_the_committed_ones(path: str) -> None:
    assert (ROOT / path).read_text() == schema.files()[path], "run `make generate` and commit"
