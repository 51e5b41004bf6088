# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A workflow with what its sources said, kept and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kubediffusion.api import DiffusionWorkflow, load_workflow
from kubediffusion.errors import InvalidWorkflow
from kubediffusion.workflow import (
    PipelineIndex,
    decode,
    encode,
    pinned_spec,
    resolve,
    revision_name,
)
from kubediffusion.workflow.revision import same_sources
from tests.unit.workflow.sd3_case import HEAD, INDEX, LORAS, controls

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))
WORKFLOWS = [path for path in EXAMPLES if "kind: DiffusionWorkflow" in path.read_text()]
FULL = (
    HEAD
    + controls(["a"])
    + LORAS
    + """
  models:
    transformer: {source: {uri: "hf://org/tuned", revision: main, subfolder: t}}
"""
)
COMMITS = {
    ("hf://org/a", ""): "c" * 40,
    ("hf://org/ink", "r1"): "d" * 40,
    ("hf://org/wash", ""): "e" * 40,
    ("hf://org/tuned", "main"): "f" * 40,
}


def full() -> DiffusionWorkflow:
    return load_workflow(FULL)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_is_read_again_is_what_was_resolved(path: Path) -> None:
    workflow = load_workflow(path.read_text())
    assert decode(encode(workflow, INDEX, {})) == resolve(workflow, INDEX)


def test_commits_are_kept() -> None:
    resolved = decode(encode(full(), INDEX, COMMITS))
    assert resolved == resolve(full(), INDEX, COMMITS)
    assert resolved.models["transformer"].revision == "f" * 40
    assert resolved.models["vae"].revision == INDEX.commit
    assert resolved.loras["ink"].revision == "d" * 40


def test_it_is_plain_json() -> None:
    """As it comes back from an API server, where 4.0 is 4."""
    data = encode(full(), INDEX, COMMITS)
    assert json.loads(json.dumps(data)) == data
    assert decode(json.loads(json.dumps(data))) == decode(data)


def test_defaults_that_an_api_server_fills_in_make_no_revision() -> None:
    bare = load_workflow(HEAD)
    spec = json.loads(bare.model_dump_json(by_alias=True, exclude_none=True))
    filled = DiffusionWorkflow.model_validate_json(json.dumps(spec))
    assert encode(filled, INDEX, {}) == encode(bare, INDEX, {})


def test_commits_of_sources_that_it_does_not_name_are_left_out() -> None:
    data = encode(load_workflow(HEAD), INDEX, COMMITS)
    assert data["commits"] == []


def test_names_are_equal_for_equal_data_alone() -> None:
    data = encode(full(), INDEX, COMMITS)
    name = revision_name("w", data)
    assert name == revision_name("w", encode(full(), INDEX, dict(reversed(COMMITS.items()))))
    assert name.startswith("w-")
    assert len(name) == len("w-") + 10
    assert name != revision_name("w", encode(full(), PipelineIndex(INDEX.components, "9"), COMMITS))
    assert name != revision_name("w", encode(full(), INDEX, {}))
    other = load_workflow(FULL + "  numerics: fast\n")
    assert name != revision_name("w", encode(other, INDEX, COMMITS))


def test_a_pinned_spec_names_commits_and_serves_the_same() -> None:
    data = encode(full(), INDEX, COMMITS)
    spec = pinned_spec(data)
    assert spec["pipeline"]["source"]["revision"] == INDEX.commit
    assert spec["models"]["transformer"]["source"]["revision"] == "f" * 40
    assert spec["controlNets"][0]["source"]["revision"] == "c" * 40
    assert [lora["source"]["revision"] for lora in spec["loras"]] == ["d" * 40, "e" * 40]
    pinned = {**data["workflow"], "spec": spec}
    again = DiffusionWorkflow.model_validate_json(json.dumps(pinned))
    # Whatever the branches point to by now.
    resolved = resolve(again, PipelineIndex(INDEX.components, INDEX.commit))
    before = decode(data)
    assert {r: m.identity for r, m in resolved.models.items()} == {
        r: m.identity for r, m in before.models.items()
    }
    assert resolved.loras == before.loras


def test_pinning_leaves_what_it_was_made_from_alone() -> None:
    data = encode(full(), INDEX, COMMITS)
    before = json.dumps(data)
    pinned_spec(data)
    assert json.dumps(data) == before


def test_sources_without_commits_stay_as_written() -> None:
    data = encode(load_workflow(HEAD), PipelineIndex(INDEX.components), {})
    assert "revision" not in pinned_spec(data)["pipeline"]["source"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "a newer KubeDiffusion wrote it; upgrade this one"),
        ({"format": None}, "the revision's format is None"),
        ({"workflow": None}, "cannot be read"),
        ({"index": {}}, "cannot be read"),
        ({"commits": [{}]}, "cannot be read"),
        ({"commits": 3}, "cannot be read"),
    ],
)
def test_what_cannot_be_read_says_so(change: dict[str, Any], says: str) -> None:
    data = {**encode(full(), INDEX, COMMITS), **change}
    with pytest.raises(InvalidWorkflow) as caught:
        decode(data)
    assert says in str(caught.value)


def test_what_a_newer_version_says_beside_the_workflow_is_passed_over() -> None:
    data = encode(full(), INDEX, COMMITS)
    assert decode({**data, "hints": {"warm": True}}) == decode(data)


def test_a_field_of_a_newer_workflow_is_named_and_not_ignored() -> None:
    data = encode(full(), INDEX, COMMITS)
    data["workflow"]["spec"]["pipeline"]["guidance"] = "9"
    with pytest.raises(InvalidWorkflow) as caught:
        decode(data)
    assert "spec.pipeline.guidance" in str(caught.value)
    assert "upgrade this one" in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "same"),
    [
        ("  numerics: fast\n", True),
        ("  slo: {deadlineSeconds: 5}\n", True),
        ("  loras:\n    - {name: x, source: {uri: 'hf://org/x'}}\n", False),
        ("  models: {vae: {source: {uri: 'hf://org/v'}}}\n", False),
    ],
)
def test_whether_an_edit_needs_another_look(extra: str, same: bool) -> None:
    assert same_sources(load_workflow(HEAD), load_workflow(HEAD + extra)) is same


def test_another_branch_of_the_pipeline_needs_another_look() -> None:
    other = HEAD.replace('uri: "hf://org/name"', 'uri: "hf://org/name", revision: dev')
    assert other != HEAD
    assert not same_sources(load_workflow(HEAD), load_workflow(other))


def test_taking_a_source_away_needs_none() -> None:
    assert same_sources(full(), load_workflow(HEAD))
