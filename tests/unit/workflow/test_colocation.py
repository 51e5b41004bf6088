# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Who hosts whom, on one machine and in a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from sd3_case import HEAD, INDEX, controls, resolved

from kubediffusion.api import load_workflow
from kubediffusion.local.plan import group_of
from kubediffusion.workflow import resolve
from kubediffusion.workflow.colocation import hosting, hosts_of, is_helper

GRAPH = yaml.safe_load((Path(__file__).parents[3] / "examples/graph.yaml").read_text())
OTHER = HEAD.replace("org/name", "org/other")


@pytest.mark.parametrize(
    ("component", "expected"),
    [
        ("controlnet", True),
        ("controlnet.edges", True),
        ("transformer", False),
        ("text_encoder_3", False),
        ("vae", False),
    ],
)
def test_only_controlnets_have_no_nodes(component: str, expected: bool) -> None:
    assert is_helper(component) is expected


def test_a_workflow_without_controlnets_hosts_none() -> None:
    assert hosts_of(resolved()) == {}


def test_the_transformer_hosts_its_controlnets() -> None:
    workflow = resolved(controls(["a", "b"]))
    assert hosts_of(workflow) == {
        "controlnet.a": ("transformer",),
        "controlnet.b": ("transformer",),
    }


def test_in_a_graph_one_that_no_node_reads_is_where_the_denoisers_are() -> None:
    nets = [{"name": "edges", "source": {"uri": "hf://org/edges"}}]
    spec = {**GRAPH["spec"], "controlNets": nets}
    workflow = resolve(load_workflow(yaml.safe_dump({**GRAPH, "spec": spec})), INDEX)
    assert hosts_of(workflow) == {"controlnet.edges": ("transformer",)}


def test_transformers_of_several_workflows_host_the_one_that_they_share() -> None:
    first, second = resolved(controls(["a"])), resolved(controls(["a", "b"]), OTHER)
    found = hosting([first, second])
    a, b = (second.models[f"controlnet.{name}"].identity for name in "ab")
    transformers = {each.models["transformer"].identity for each in (first, second)}
    assert len(transformers) == 2
    assert found == {a: transformers, b: {second.models["transformer"].identity}}


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_one_machine_and_a_cluster_agree(names: list[str]) -> None:
    """A group of `local` is a node: a ControlNet's is the one of each of its hosts."""
    workflow = resolved(controls(names))
    for helper, hosts in hosts_of(workflow).items():
        assert {group_of(host) for host in hosts} == {group_of(helper)}
    alone = set(workflow.models) - set(hosts_of(workflow)) - {"transformer"}
    assert group_of("transformer") not in {group_of(role) for role in alone}
