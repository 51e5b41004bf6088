# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Values that make no sense are refused before anything is installed, and the words say which."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from tests.unit.chart.conftest import Render
from tests.unit.chart.rendering import CHART, EVERYTHING, EXAMPLES, HelmError

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())

# (values, what the refusal must say)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"replicas": 3}, "additional properties 'replicas' not allowed"),
    ({"gateway": {"replica": 3}}, "additional properties 'replica' not allowed"),
    ({"operator": {"replicas": 2}}, "additional properties 'replicas' not allowed"),
    ({"gateway": {"replicas": -1}}, "/gateway/replicas"),
    ({"gateway": {"replicas": "three"}}, "/gateway/replicas"),
    ({"gateway": {"service": {"type": "ExternalName"}}}, "/gateway/service/type"),
    ({"gateway": {"publicUrl": "images.example.com"}}, "/gateway/publicUrl"),
    ({"gateway": {"apiKeys": {"keys": ["short"]}}}, "/gateway/apiKeys/keys/0"),
    ({"gateway": {"apiKeys": {"keys": ["with a space"]}}}, "/gateway/apiKeys/keys/0"),
    ({"gateway": {"resources": {"requests": {"cpu": "a lot"}}}}, "/gateway/resources/requests/cpu"),
    ({"gateway": {"ingress": {"hosts": ["https://x"]}}}, "/gateway/ingress/hosts/0"),
    ({"gateway": {"drainSeconds": 1.5}}, "/gateway/drainSeconds"),
    ({"image": {"node": {"digest": "sha256:abc"}}}, "/image/node/digest"),
    ({"image": {"node": {"pullPolicy": "Sometimes"}}}, "/image/node/pullPolicy"),
    ({"image": {"node": {"repository": ""}}}, "/image/node/repository"),
    ({"imagePullSecrets": ["registry"]}, "/imagePullSecrets/0"),
    ({"logLevel": "verbose"}, "/logLevel"),
    ({"nodes": {"device": "rocm"}}, "/nodes/device"),
    ({"nodes": {"gpuBudget": -1}}, "/nodes/gpuBudget"),
    ({"nodes": {"gpuResource": "gpu"}}, "/nodes/gpuResource"),
    ({"nodes": {"podTemplate": {"nodeSelector": {"a": "b"}}}}, "'nodeSelector' not allowed"),
    ({"weights": {"size": "much"}}, "/weights/size"),
    ({"weights": {"accessModes": []}}, "/weights/accessModes"),
    ({"hfToken": {"secretName": "Not A Name"}}, "/hfToken/secretName"),
    ({"prometheus": {"scrapeIntervalSeconds": 0}}, "/prometheus/scrapeIntervalSeconds"),
    ({"prometheus": {"retention": "forever"}}, "/prometheus/retention"),
    ({"prometheus": {"size": "0Gi"}}, "/prometheus/size"),
    ({"monitors": {"kind": "Monitor"}}, "/monitors/kind"),
    ({"networkPolicy": {"apiServer": {"cidr": "10.0.0.1"}}}, "/networkPolicy/apiServer/cidr"),
    ({"networkPolicy": {"apiServer": {"ports": []}}}, "/networkPolicy/apiServer/ports"),
    ({"test": {"prompt": ""}}, "/test/prompt"),
    # What no single value is wrong in.
    ({"weights": {"create": True, "existingClaim": "w"}}, "either existingClaim, or create"),
    (
        {"gateway": {"apiKeys": {"existingSecret": "k", "keys": ["abcdefgh"]}}},
        "either existingSecret, or keys",
    ),
    ({"prometheus": {"url": "http://p:9090"}}, "set prometheus.enabled=false"),
    (
        {"gateway": {"autoscaling": {"enabled": True, "minReplicas": 9}}},
        "minReplicas is above maxReplicas",
    ),
    ({"gateway": {"ingress": {"enabled": True}}}, "name at least one host"),
]


@pytest.mark.parametrize(
    ("values", "words"), WRONG, ids=[json.dumps(values)[1:60] for values, _ in WRONG]
)
def test_wrong_values_are_refused(render: Render, values: dict[str, Any], words: str) -> None:
    with pytest.raises(HelmError) as refused:
        render(values)
    assert words in str(refused.value)


def test_values_that_are_right_are_taken() -> None:
    """By the schema alone: the other side of the refusals."""
    validator = jsonschema.Draft7Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    for values in (VALUES, EVERYTHING, *(yaml.safe_load(path.read_text()) for path in EXAMPLES)):
        assert [error.message for error in validator.iter_errors(values)] == []


def test_what_can_be_set_is_written_down() -> None:
    """values.yaml and its schema name the same values, so none is secret and none is dead."""
    written = set(_leaves(VALUES))
    known = set(_properties(SCHEMA))
    told = {each for each in known if any(_within(path, each) for path in written)}
    assert known - told == {"global"}
    # What Kubernetes has, and maps of labels, go deeper than the schema.
    assert {path for path in written if not any(_within(path, each) for each in known)} == set()


def test_every_value_is_used() -> None:
    templates = "".join(path.read_text() for path in sorted((CHART / "templates").rglob("*.*")))
    for path in _properties(SCHEMA):
        last = path.rpartition(".")[2]
        assert path == "global" or f".{last}" in templates or f'"{last}"' in templates, path


def _leaves(values: Any, path: str = "") -> Iterator[str]:
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path


def _properties(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Paths of the values that the schema names; those of references to it all count as one."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    # A part of Kubernetes' own types: one value.
    if "properties" not in schema or path.endswith((".resources", ".podTemplate")):
        yield path
        return
    for name, value in schema["properties"].items():
        yield from _properties(value, f"{path}.{name}" if path else name)


def _within(path: str, known: str) -> bool:
    return path == known or path.startswith(f"{known}.")
