# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a gateway makes of the cluster's objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubediffusion.api import load_workflow
from kubediffusion.cluster.view import View, addresses, view
from kubediffusion.errors import InvalidWorkflow
from kubediffusion.workflow import PipelineIndex, ResolvedWorkflow, resolve

TEXT = """
apiVersion: kubediffusion.io/v1alpha1
kind: DiffusionWorkflow
metadata: {{name: {name}}}
spec:
  pipeline:
    preset: StableDiffusion3
    source: {{uri: "file:///models/{model}"}}
"""
INDEX = PipelineIndex(
    {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
)


def resolved(name: str, model: str = "one") -> ResolvedWorkflow:
    return resolve(load_workflow(TEXT.format(name=name, model=model)), INDEX)


def workflow(name: str, revision: str = "", uid: str = "", **metadata: Any) -> dict[str, Any]:
    status = {"revision": revision} if revision else {}
    return {"metadata": {"name": name, "uid": uid or f"uid-{name}", **metadata}, "status": status}


def revision(name: str) -> dict[str, Any]:
    """Its data is the name and the model of its workflow."""
    workflow_name, _, model = name.rpartition("-")
    return {"metadata": {"name": name}, "data": {"name": workflow_name, "model": model}}


def decode(found: Mapping[str, Any]) -> ResolvedWorkflow:
    data = found["data"]
    if data["model"] == "bad":
        raise InvalidWorkflow("the revision's format is 7 and this version reads 1")
    return resolved(data["name"], data["model"])


def look(workflows: list[dict[str, Any]], revisions: list[str], before: View | None = None) -> View:
    return view(workflows, map(revision, revisions), (), decode, before)


def served(found: View) -> dict[str, str]:
    return {name: each.revision for name, each in found.served.items()}


# ---------------------------------------------------------------- workflows


def test_each_workflow_is_served_at_its_revision() -> None:
    found = look([workflow("a", "a-one"), workflow("b", "b-two")], ["a-one", "a-two", "b-two"])
    assert served(found) == {"a": "a-one", "b": "b-two"}
    assert found.workflows == {"a": resolved("a", "one"), "b": resolved("b", "two")}
    assert not found.skipped


def test_a_workflow_without_a_revision_is_not_served_yet() -> None:
    found = look([workflow("a"), {"metadata": {"name": "b"}}], [])
    assert (served(found), found.skipped) == ({}, {})


def test_one_that_cannot_be_read_does_not_stop_the_others() -> None:
    found = look([workflow("a", "a-bad"), workflow("b", "b-one")], ["a-bad", "b-one"])
    assert served(found) == {"b": "b-one"}
    assert "format is 7" in found.skipped["a"]


@pytest.mark.parametrize("next_revision", ["a-bad", "a-unknown"])
def test_the_revision_before_goes_on_where_the_next_one_cannot_be_had(next_revision: str) -> None:
    before = look([workflow("a", "a-one")], ["a-one"])
    found = look([workflow("a", next_revision)], ["a-bad"], before)
    assert served(found) == {"a": "a-one"}
    assert next_revision in found.skipped["a"]
    again = look([workflow("a", "a-two")], ["a-two"], found)
    assert (served(again), again.skipped) == ({"a": "a-two"}, {})


def test_a_workflow_that_was_made_again_is_another_one() -> None:
    before = look([workflow("a", "a-one")], ["a-one"])
    found = look([workflow("a", "a-unknown", uid="other")], [], before)
    assert served(found) == {}


def test_a_deleted_workflow_is_gone_though_its_object_lingers() -> None:
    before = look([workflow("a", "a-one")], ["a-one"])
    going = workflow("a", "a-one", deletionTimestamp="2026-01-01T00:00:00Z")
    assert served(look([going], ["a-one"], before)) == {}
    assert served(look([], ["a-one"], before)) == {}


def test_a_revision_of_another_workflow_is_refused() -> None:
    found = look([workflow("a", "b-one")], ["b-one"])
    assert served(found) == {}
    assert "another workflow" in found.skipped["a"]


# ---------------------------------------------------------------- nodes


def endpoint(address: str, pod: str = "", **conditions: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"addresses": [address], "conditions": conditions}
    if pod:
        found["targetRef"] = {"kind": "Pod", "name": pod, "uid": f"uid-{pod}"}
    return found


def slice_of(*endpoints: dict[str, Any], family: str = "IPv4", port: int = 7070) -> dict[str, Any]:
    ports = [{"name": "metrics", "port": 9090}, {"name": "grpc", "port": port}]
    return {"addressType": family, "ports": ports, "endpoints": [*endpoints]}


def test_ready_or_not_a_node_is_dialled_until_it_terminates() -> None:
    found = slice_of(
        endpoint("10.0.0.2", "b", ready=True, serving=True, terminating=False),
        endpoint("10.0.0.1", "a", ready=False, serving=False, terminating=False),
        endpoint("10.0.0.3", "c", ready=False, serving=True, terminating=True),
        endpoint("10.0.0.4"),
    )
    assert addresses([found]) == ("10.0.0.1:7070", "10.0.0.2:7070", "10.0.0.4:7070")


def test_a_pod_with_two_addresses_is_one_node() -> None:
    six = slice_of(endpoint("fd00::1", "a"), endpoint("fd00::2", "b"), family="IPv6")
    four = slice_of(endpoint("10.0.0.1", "a"))
    for slices in ([six, four], [four, six]):
        assert addresses(slices) == ("10.0.0.1:7070", "[fd00::2]:7070")


def test_a_pod_that_terminates_in_one_slice_terminates_in_all() -> None:
    six = slice_of(endpoint("fd00::1", "a"), family="IPv6")
    four = slice_of(endpoint("10.0.0.1", "a", terminating=True))
    assert addresses([six, four]) == ()


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"addressType": "IPv4"},
        {"addressType": "IPv4", "ports": None, "endpoints": None},
        {"addressType": "IPv4", "ports": [{"port": 80}], "endpoints": [endpoint("10.0.0.1")]},
        {**slice_of(), "endpoints": [{"addresses": []}, {"addresses": None}, {}]},
        slice_of(endpoint("model.example.com"), family="FQDN"),
    ],
)
def test_slices_that_say_nothing_of_nodes_are_passed_over(odd: dict[str, Any]) -> None:
    assert addresses([odd, slice_of(endpoint("10.0.0.9"))]) == ("10.0.0.9:7070",)


pods = st.sampled_from(["", "a", "b", "c"])
hosts = st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3"])
endpoints = st.builds(endpoint, hosts, pods, terminating=st.booleans())
slices = st.lists(st.lists(endpoints, max_size=4).map(lambda each: slice_of(*each)), max_size=3)


@given(slices)
def test_no_node_is_there_twice_and_the_order_of_the_slices_does_not_matter(
    found: list[dict[str, Any]],
) -> None:
    known = addresses(found)
    assert len(set(known)) == len(known)
    assert known == addresses(found[::-1])


@pytest.mark.parametrize(
    "status",
    [
        {"draining": [{"revision": "sd3-old"}, {"revision": "sd3-bad"}, {"revision": "none"}]},
        {"previousRevision": "sd3-old"},  # of an older operator
    ],
)
def test_models_of_revisions_that_drain_are_known(status: dict[str, Any]) -> None:
    each = workflow("sd3", "sd3-one")
    each["status"] |= status
    revisions = [revision(name) for name in ("sd3-one", "sd3-old", "sd3-bad", "sd3-older")]
    found = view([each], revisions, [], decode)
    assert found.draining == {ref.identity for ref in resolved("sd3", "old").models.values()}
    each["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert view([each], revisions, [], decode).draining == frozenset()
