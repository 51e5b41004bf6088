# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Each rule of the CRDs on both sides, by a real API server; and the types say the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import BaseModel

from kubediffusion.api import DiffusionModel, DiffusionWorkflow, ModelPool, load, schema
from kubediffusion.errors import InvalidWorkflow
from tests.cluster.crds.manifests import GRAPH, MISSING, MODEL, POOL, WORKFLOW, changed
from tests.cluster.kube import ApiError, Kube

TRANSFORMER = "spec.models.transformer"
KINDS: dict[str, type[BaseModel]] = {
    kind.__name__: kind for kind in (DiffusionWorkflow, DiffusionModel, ModelPool)
}


@dataclass(frozen=True)
class Case:
    """`good` and `bad` are changes of `base`; the server's words about `bad` hold `says`."""

    base: dict[str, Any]
    good: dict[str, Any]
    bad: dict[str, Any]
    says: str
    # Only `workflow.resolve` says it outside a cluster.
    types_say: bool = field(default=True)


CASES = {
    "preset or family": Case(
        WORKFLOW, {}, {"spec.pipeline.family": "sd3"}, "give preset (graph and inputs come with it)"
    ),
    "neither preset nor family": Case(
        WORKFLOW, {}, {"spec.pipeline.preset": MISSING}, "give preset (graph and inputs"
    ),
    "a pipeline at the top of its source": Case(
        WORKFLOW,
        {"spec.pipeline.source.subfolder": ""},
        {"spec.pipeline.source.subfolder": "inner"},
        "put the folder into the uri",
    ),
    "a LoRA's scale": Case(
        WORKFLOW,
        {"spec.loras.0.scale": "10"},
        {"spec.loras.0.scale": "10.5"},
        "scale must lie in -10 to 10",
    ),
    "latencyScale or deadlineSeconds": Case(
        WORKFLOW,
        {"spec.slo": {"deadlineSeconds": 9}},
        {"spec.slo.deadlineSeconds": 9},
        "give latencyScale or deadlineSeconds, not both",
    ),
    "latencyScale of at least one": Case(
        WORKFLOW,
        {"spec.slo.latencyScale": "1.0"},
        {"spec.slo.latencyScale": "0.9"},
        'at least "1.0"',
    ),
    "an input's bounds": Case(
        WORKFLOW,
        {"spec.inputs.steps.minimum": 50},
        {"spec.inputs.steps.minimum": 51},
        "maximum is below minimum",
    ),
    "a graph goes with a family": Case(
        WORKFLOW, {}, {"spec.graph": GRAPH["spec"]["graph"]}, "a graph goes with pipeline.family"
    ),
    "a family needs a graph": Case(
        GRAPH, {}, {"spec.graph": MISSING}, "a graph goes with pipeline.family"
    ),
    "an override of a declared ControlNet": Case(
        WORKFLOW,
        {"spec.models.controlnet\\.edges": {"dtype": "float16"}},
        {"spec.models.controlnet\\.depth": {"dtype": "float16"}},
        "a ControlNet that controlNets does not declare",
        types_say=False,
    ),
    "an override where no ControlNet is declared": Case(
        WORKFLOW,
        {"spec.controlNets": MISSING, "spec.models.controlnet\\.edges": MISSING},
        {"spec.controlNets": MISSING},
        "a ControlNet that controlNets does not declare",
        types_say=False,
    ),
    "a ControlNet is not left out by enabled": Case(
        WORKFLOW,
        {"spec.models.controlnet\\.edges.enabled": True},
        {"spec.models.controlnet\\.edges.enabled": False},
        "remove it from controlNets",
        types_say=False,
    ),
    "a graph's input needs its type": Case(
        GRAPH,
        {"spec.inputs.steps": {"type": "integer"}},
        {"spec.inputs.steps": {"default": 3}},
        "an input of a graph needs its type",
        types_say=False,
    ),
    "a graph's input requires a declared one": Case(
        GRAPH,
        {"spec.inputs.strength.requires": "prompt"},
        {"spec.inputs.strength.requires": "image"},
        "requires another one that the workflow does not declare",
        types_say=False,
    ),
    "bounds of replicas": Case(
        WORKFLOW,
        {f"{TRANSFORMER}.scaling.minReplicas": 4},
        {f"{TRANSFORMER}.scaling.minReplicas": 5},
        "maxReplicas is below minReplicas",
    ),
    "a target above zero": Case(
        WORKFLOW,
        {f"{TRANSFORMER}.scaling.targetPerReplica": "0.5"},
        {f"{TRANSFORMER}.scaling.targetPerReplica": "0"},
        "targetPerReplica must be above 0",
    ),
    "a request within its limit": Case(
        WORKFLOW,
        {f"{TRANSFORMER}.resources.requests": {"memory": "16384Mi"}},
        {f"{TRANSFORMER}.resources.requests": {"memory": "16385Mi"}},
        "a request is above its limit",
    ),
    "devices under limits": Case(
        WORKFLOW,
        {f"{TRANSFORMER}.resources.requests": {"nvidia.com/gpu": "1"}},
        {f"{TRANSFORMER}.resources": {"requests": {"nvidia.com/gpu": "1"}}},
        "write them under limits alone",
    ),
    "a budget of tokens": Case(
        WORKFLOW,
        {f"{TRANSFORMER}.pruning.budget": "1"},
        {f"{TRANSFORMER}.pruning.budget": "1.1"},
        "above 0 and at most 1",
    ),
    "the least budget": Case(
        WORKFLOW,
        {f"{TRANSFORMER}.pruning.minBudget": "0.6"},
        {f"{TRANSFORMER}.pruning.minBudget": "0.7"},
        "minBudget is above budget",
    ),
    "the most budget": Case(
        WORKFLOW,
        {f"{TRANSFORMER}.pruning.maxBudget": "0.6"},
        {f"{TRANSFORMER}.pruning.maxBudget": "0.5"},
        "maxBudget is below budget",
    ),
    "the most budget where none is named": Case(
        WORKFLOW,
        {f"{TRANSFORMER}.pruning": {"artifact": {"uri": "hf://o/p"}, "maxBudget": "1"}},
        {f"{TRANSFORMER}.pruning": {"artifact": {"uri": "hf://o/p"}, "maxBudget": "0.5"}},
        "maxBudget is below budget",
    ),
    "an error that a cache may make": Case(
        WORKFLOW,
        {"spec.caching": {"steps": {"threshold": "0.1", "ratios": ["1", "0.9"]}}},
        {"spec.caching": {"steps": {"threshold": "0", "ratios": ["1", "0.9"]}}},
        "the error that a reused step may have",
    ),
    "a cache that was calibrated": Case(
        WORKFLOW,
        {"spec.caching": {"steps": {"method": "first-block", "threshold": "0.1"}}},
        {"spec.caching": {"steps": {"threshold": "0.1"}}},
        "magcache needs the ratios of the model",
    ),
    "a share of first steps": Case(
        WORKFLOW,
        {"spec.caching.steps": {"threshold": "1", "ratios": ["1", "1"], "retention": "1"}},
        {"spec.caching.steps": {"threshold": "1", "ratios": ["1", "1"], "retention": "1.1"}},
        "retention is a share of the steps",
    ),
    "a model in a pool has no pods": Case(
        WORKFLOW,
        {"spec.models.vae": {"placement": {"pool": "p"}, "drainSeconds": 5}},
        {"spec.models.vae": {"placement": {"pool": "p"}, "podTemplate": {"spec": {}}}},
        "set resources and podTemplate in the ModelPool",
    ),
    "a workflow's name": Case(
        WORKFLOW,
        {"metadata.name": "w" * 52},
        {"metadata.name": "w" * 53},
        "its revisions are named <name>-<hash>",
    ),
    "a workflow's name without dots": Case(
        WORKFLOW, {"metadata.name": "a-b"}, {"metadata.name": "a.b"}, "letters, digits and dashes"
    ),
    "a model's name": Case(
        MODEL,
        {"metadata.name": "m" * 40},
        {"metadata.name": "m" * 41},
        "it names its Deployment",
    ),
    "a model's name begins with a letter": Case(
        MODEL, {"metadata.name": "m1"}, {"metadata.name": "1m"}, "begins with a letter"
    ),
    "a pooled model has no resources": Case(
        MODEL,
        {"spec.placement": {"pool": "p"}},
        {"spec.placement": {"pool": "p"}, "spec.resources": {"limits": {"cpu": "1"}}},
        "set resources and podTemplate in the ModelPool",
    ),
    "a pool's name": Case(
        POOL, {"metadata.name": "p" * 40}, {"metadata.name": "p" * 41}, "pool-<name> names"
    ),
    "a pool's memory": Case(
        POOL, {"spec.memoryLimit": "0.5Gi"}, {"spec.memoryLimit": "0"}, "leaves no room for a model"
    ),
}

# What a model's identity is made of: a change of each alone, and one that says the same.
IDENTITY = {
    "component": ("transformer", "vae"),
    "dtype": ("float16", "bfloat16"),
    "className": ("Other", "AutoencoderKL"),
    "attentionBackend": (MISSING, "native"),
    "compile": ("none", "default"),
    "quantization": ("", "int8"),
    "tiling": (False, True),
    "source.uri": ("hf://org/other", "hf://org/name"),
    "source.revision": ("v2", "v1"),
    "source.subfolder": (MISSING, "vae"),
    "source.variant": ("", "fp16"),
    "pruning.artifact.uri": ("hf://org/p2", "hf://org/pruned"),
    "pruning": (MISSING, {"artifact": {"uri": "hf://org/pruned"}}),
}
FREE: dict[str, Any] = {
    "replicas": 5,
    "scaling": {"minReplicas": 0, "maxReplicas": 2},
    "resources": {"limits": {"memory": "1Gi"}},
    "podTemplate": {"spec": {"priorityClassName": "x"}},
    "drainSeconds": 5,
    "loras": [{"name": "ink", "source": {"uri": "builtin://x"}}],
}


@pytest.fixture(scope="module")
def server(admin: Kube, crds: list[str]) -> Kube:
    assert crds
    return admin


def refusal(server: Kube, document: dict[str, Any]) -> str:
    with pytest.raises(ApiError) as caught:
        server.create(document, dry_run=True)
    assert caught.value.status == 422
    return str(caught.value)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_a_rule_allows_is_taken(server: Kube, case: Case) -> None:
    server.create(changed(case.base, case.good), dry_run=True)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_a_rule_forbids_is_refused_with_what_to_write(server: Kube, case: Case) -> None:
    assert case.says in refusal(server, changed(case.base, case.bad))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_types_agree(case: Case) -> None:
    kind = KINDS[case.base["kind"]]
    load(kind, json.dumps(changed(case.base, case.good)))
    if case.types_say:
        with pytest.raises(InvalidWorkflow) as caught:
            load(kind, json.dumps(changed(case.base, case.bad)))
        # Shorter patterns of names and numbers may speak first; a rule says what to write.
        assert case.says in str(caught.value) or "metadata.name" in str(caught.value)


def messages(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for rule in node.get("x-kubernetes-validations", ()):
            yield rule["message"]
        for value in node.values():
            yield from messages(value)


def test_every_rule_of_the_crds_has_its_case() -> None:
    """A rule without a test on both sides does not get in."""
    said = {case.says for case in CASES.values()}
    for definition in schema.DEFINITIONS:
        for message in messages(schema.crd(definition)):
            if "is part of the model's identity" in message:
                assert message.split()[0] in {path.split(".")[0] for path in IDENTITY} | {"family"}
            else:
                assert any(each in message for each in said), message


@pytest.fixture
def model(kube: Kube, crds: list[str]) -> Kube:
    assert crds
    kube.create(MODEL)
    return kube


@pytest.mark.parametrize("path", IDENTITY)
def test_what_makes_a_models_identity_cannot_change(model: Kube, path: str) -> None:
    other, same = IDENTITY[path]
    known = model.get("DiffusionModel", MODEL["metadata"]["name"])
    with pytest.raises(ApiError) as caught:
        model.replace(changed(known, {f"spec.{path}": other}))
    word = path.split(".")[0]
    assert f"{word} is part of the model's identity and cannot change" in str(caught.value)
    model.replace(changed(known, {f"spec.{path}": same}))


def test_an_identity_field_left_out_is_an_empty_one(kube: Kube, crds: list[str]) -> None:
    assert crds
    bare = changed(
        MODEL,
        {
            "spec.className": MISSING,
            "spec.quantization": "",
            "spec.source.revision": MISSING,
            "spec.pruning": MISSING,
        },
    )
    known = kube.create(bare)
    known = kube.replace(changed(known, {"spec.className": "", "spec.source.revision": ""}))
    kube.replace(changed(known, {"spec.quantization": MISSING, "spec.className": MISSING}))


@pytest.mark.parametrize("field", FREE)
def test_how_a_model_is_served_can_change(model: Kube, field: str) -> None:
    known = model.get("DiffusionModel", MODEL["metadata"]["name"])
    after = model.replace(changed(known, {f"spec.{field}": FREE[field]}))
    assert after["metadata"]["generation"] == 2


@pytest.mark.parametrize(
    ("base", "path"),
    [
        (WORKFLOW, "spec.pipline"),
        (WORKFLOW, "spec.models.transformer.scaling.min"),
        (MODEL, "spec.sources"),
        (POOL, "spec.memory"),
    ],
)
def test_an_unknown_field_is_refused_where_it_is_asked_for(
    server: Kube, base: dict[str, Any], path: str
) -> None:
    """As kubectl asks for it by default."""
    with pytest.raises(ApiError) as caught:
        server.create(changed(base, {path: 1}), dry_run=True, fieldValidation="Strict")
    assert f'unknown field "{path}"' in str(caught.value)
