# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A workflow file: what is taken, and how what is wrong is told."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubediffusion.api import DiffusionModel, ModelPool, load, load_workflow
from kubediffusion.errors import InvalidWorkflow

GOOD = """\
apiVersion: kubediffusion.io/v1alpha1
kind: DiffusionWorkflow
metadata:
  name: w
spec:
  pipeline:
    preset: StableDiffusion3
    source: {uri: "hf://org/name"}
"""


def error(text: str | bytes, source: str = "w.yaml") -> InvalidWorkflow:
    with pytest.raises(InvalidWorkflow) as caught:
        load_workflow(text, source=source)
    return caught.value


def test_the_smallest_workflow() -> None:
    workflow = load_workflow(GOOD)
    assert workflow.metadata.name == "w"
    assert workflow.spec.pipeline.dtype == "float32"
    assert workflow.spec.numerics == "exact"


def test_an_unknown_field_is_named_with_its_line_and_the_likely_one() -> None:
    found = error(GOOD + "  controlnets: []\n")
    assert found.field == "spec.controlnets"
    assert "did you mean controlNets?" in found.message
    assert "w.yaml, line 9" in found.message


def test_a_path_goes_into_lists() -> None:
    found = error(GOOD + "  controlNets:\n  - name: a\n    source: {uri: 'http://x'}\n")
    assert found.field == "spec.controlNets[0].source.uri"
    assert "line 11" in found.message


def test_all_problems_are_told_at_once() -> None:
    text = GOOD.replace("name: w", "name: W!").replace("StableDiffusion3", "StableDifusion3")
    found = error(text + "  numeric: fast\n")
    assert found.field == "metadata.name"
    assert "spec.pipeline.preset" in found.message
    assert "did you mean StableDiffusion3?" in found.message
    assert "spec.numeric: unknown field; did you mean numerics?" in found.message


def test_rules_between_fields_name_the_field() -> None:
    scaling = "  models: {vae: {scaling: {minReplicas: 3, maxReplicas: 2}}}\n"
    found = error(GOOD + scaling + '  slo: {latencyScale: "2", deadlineSeconds: 5}\n')
    assert "spec.slo.deadlineSeconds" in str(found)
    assert "spec.models.vae.scaling.maxReplicas" in str(found)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("    family: sd3\n", "spec.pipeline.preset"),
        ("  slo: {latencyScale: '0.5'}\n", "spec.slo.latencyScale"),
        (
            "  models: {vae: {scaling: {targetPerReplica: '0'}}}\n",
            "spec.models.vae.scaling.targetPerReplica",
        ),
        (
            "  models: {vae: {pruning: {artifact: {uri: 'hf://a/b'}, budget: '1.5'}}}\n",
            "spec.models.vae.pruning.budget",
        ),
        ("  inputs: {steps: {minimum: 5, maximum: 4}}\n", "spec.inputs.steps.maximum"),
        (
            "  loras: [{name: a, scale: '11', source: {uri: 'hf://a/b'}}]\n",
            "spec.loras[0].scale",
        ),
        (
            "  loras: [{name: a, source: {uri: 'hf://a/b'}}, {name: a, source: {uri: 'hf://a/c'}}]\n",
            "spec.loras",
        ),
        (
            "  graph: {nodes: [{name: a, model: vae, stage: decode}], output: a.image}\n",
            "spec.graph",
        ),
    ],
)
def test_each_rule_between_fields_holds(change: str, field: str) -> None:
    assert f"{field}: " in str(error(GOOD + change))


def test_a_number_where_kubernetes_wants_text_says_to_quote_it() -> None:
    found = error(GOOD + "  slo: {latencyScale: 2.0}\n")
    assert 'put it in quotes: "2.0"' in found.message


def test_a_key_given_twice() -> None:
    assert "given twice" in error(GOOD + "  numerics: exact\n  numerics: fast\n").message


def test_a_field_without_a_value() -> None:
    found = error(GOOD + "  inputs:\n")
    assert found.field == "spec.inputs"
    assert "has no value" in found.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("- a\n", "a mapping is expected"),
        ("just text", "a mapping is expected"),
        ("a: [1, 2", "not valid YAML"),
        (GOOD + "---\n" + GOOD, "more than one document"),
        (b"\xff\xfe\x00", "UTF-8"),
        ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("a: &a [*a]\n", "nested deeper"),
        ("x" * (1 << 20) + "x", "characters"),
    ],
)
def test_text_that_is_no_workflow(text: str | bytes, words: str) -> None:
    assert words in error(text).message


def test_aliases_that_multiply_are_counted() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "more than" in error("\n".join(lines)).message


def test_relative_files_are_relative_to_the_base() -> None:
    text = GOOD.replace("hf://org/name", "file://weights/sd3")
    text += "  controlNets: [{name: e, source: {uri: 'file://../edges'}}]\n"
    spec = load_workflow(text, base="/srv/flows").spec
    assert spec.pipeline.source.uri == "file:///srv/flows/weights/sd3"
    assert spec.control_nets[0].source.uri == "file:///srv/edges"
    text = GOOD.replace("hf://org/name", "file:///abs/sd3")
    assert load_workflow(text, base="/srv").spec.pipeline.source.uri == "file:///abs/sd3"


def test_models_and_pools_load_too() -> None:
    model = load(
        DiffusionModel,
        """
apiVersion: kubediffusion.io/v1alpha1
kind: DiffusionModel
metadata: {name: vae-1}
spec: {family: sd3, component: vae, source: {uri: "hf://a/b", subfolder: vae}, replicas: 2}
""",
    )
    assert model.spec.drain_seconds == 120
    pool = load(
        ModelPool,
        """
apiVersion: kubediffusion.io/v1alpha1
kind: ModelPool
metadata: {name: small}
spec: {replicas: 2, memoryLimit: 20Gi, podTemplate: {spec: {priorityClassName: null}}}
""",
    )
    assert pool.spec.memory_limit == "20Gi"


@given(st.text(max_size=200) | st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_text_is_taken_or_refused(text: str | bytes) -> None:
    with pytest.raises(InvalidWorkflow):
        load_workflow(text)


@given(st.integers(0, len(GOOD) - 1), st.characters())
@settings(max_examples=100, deadline=None)
def test_a_damaged_file_is_taken_or_refused(position: int, character: str) -> None:
    text = GOOD[:position] + character + GOOD[position + 1 :]
    with contextlib.suppress(InvalidWorkflow):
        load_workflow(text)
