# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Operator and gateway of different versions: what the one writes, the other reads.

The operator's plan is carried out in memory and handed to the gateway's view; fields come that this
version does not know, as a newer one would write them, and those go that an older one did not.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest

from kubediffusion.cluster.follow import OURS
from kubediffusion.cluster.view import View, view
from kubediffusion.workflow.revision import decode
from kubediffusion_operator.planning import PlanCache
from kubediffusion_operator.planning.children import RESIDENCY_KEY
from tests.unit.planning.world import World

Object = dict[str, Any]


@pytest.fixture
def world() -> World:
    """A workflow with two revisions, of which the first drains."""
    world = World()
    for model in ("a", "b"):
        models = {"transformer": {"source": {"uri": f"hf://org/{model}"}}}
        world.workflow("w", models=models)
        world.settle()
    assert len(world.status("DiffusionWorkflow", "w")["draining"]) == 1
    return world


def slices(world: World) -> list[Object]:
    """As Kubernetes makes them of a headless Service: its labels, its ports by name."""
    found: list[Object] = []
    for number, (name, service) in enumerate(sorted(world.all("Service").items())):
        ports = [
            {"name": port["name"], "port": port["port"], "protocol": port["protocol"]}
            for port in service["spec"]["ports"]
        ]
        endpoint = {
            "addresses": [f"10.0.0.{number + 1}"],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "targetRef": {"kind": "Pod", "name": f"{name}-0", "uid": f"pod-{name}"},
        }
        labels = {**service["metadata"]["labels"], "kubernetes.io/service-name": name}
        found.append(
            {
                "metadata": {"name": f"{name}-x", "labels": labels},
                "addressType": "IPv4",
                "ports": ports,
                "endpoints": [endpoint],
            }
        )
    return found


def selected(objects: list[Object]) -> list[Object]:
    label, _, value = OURS.partition("=")
    return [each for each in objects if each["metadata"].get("labels", {}).get(label) == value]


def looked_at(workflows: list[Object], revisions: list[Object], found: list[Object]) -> View:
    return view(
        workflows, selected(revisions), selected(found), lambda each: decode(each.get("data") or {})
    )


def parts(world: World) -> tuple[list[Object], list[Object], list[Object]]:
    workflows = list(world.all("DiffusionWorkflow").values())
    return workflows, list(world.all("ControllerRevision").values()), slices(world)


def test_a_gateway_reads_what_the_operator_writes(world: World) -> None:
    found = looked_at(*parts(world))
    status = world.status("DiffusionWorkflow", "w")
    assert not found.skipped
    assert found.served["w"].revision == status["revision"]
    served = {ref.identity for ref in found.served["w"].workflow.models.values()}
    assert served < found.draining | served == set(world.all("DiffusionModel"))
    assert len(found.addresses) == len(world.all("Deployment"))
    assert all(address.endswith(":7070") for address in found.addresses)


def from_the_future(each: Any, *path: str) -> Any:
    """With a field more in every object of it, but for a workflow in a revision, whose fields all
    mean something for the picture: one with an unknown one is not served."""
    if isinstance(each, list):
        return [from_the_future(item, *path) for item in each]
    if not isinstance(each, dict) or path[-2:] == ("data", "workflow"):
        return each
    known = {key: from_the_future(item, *path, key) for key, item in each.items()}
    # Components of a pipeline are names of its own.
    return known if path[-1:] == ("components",) else {**known, "fromTheFuture": {"a": ["b"]}}


def test_a_gateway_passes_over_what_only_a_newer_operator_writes(world: World) -> None:
    before = looked_at(*parts(world))
    workflows, revisions, found = (from_the_future(each) for each in parts(world))
    assert looked_at(workflows, revisions, found) == before


def test_a_gateway_does_without_what_an_older_operator_did_not_write(world: World) -> None:
    """Of a status the revision, of metadata name and label, of an endpoint its address."""
    before = looked_at(*parts(world))
    workflows, revisions, found = copy.deepcopy(parts(world))
    label = OURS.partition("=")[0]
    for each in (*workflows, *revisions, *found):
        meta = each["metadata"]
        labels = {key: value for key, value in meta.get("labels", {}).items() if key == label}
        each["metadata"] = {"name": meta["name"], "labels": labels} | (
            {"uid": meta["uid"]} if "uid" in meta else {}
        )
    for each in workflows:
        each["status"] = {"revision": each["status"]["revision"]}
    for each in found:
        each["endpoints"] = [{"addresses": e["addresses"]} for e in each["endpoints"]]
    after = looked_at(workflows, revisions, found)
    assert (after.served, after.addresses) == (before.served, before.addresses)
    assert after.draining == frozenset()


KINDS = (
    "ControllerRevision",
    "DiffusionModel",
    "ConfigMap",
    "Service",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "Deployment",
)


def uids(world: World) -> Mapping[str, set[str]]:
    return {kind: {o["metadata"]["uid"] for o in world.all(kind).values()} for kind in KINDS}


def restarted(world: World) -> None:
    """The operator, of another version, has nothing but what is in the cluster."""
    world.cache = PlanCache()
    world.residency.clear()


def test_an_operator_takes_over_what_a_newer_one_wrote(world: World) -> None:
    """It makes it its own and comes to rest; nothing is made anew, and the same is served."""
    before, served = uids(world), world.status("DiffusionWorkflow", "w")["revision"]
    for kind in ("DiffusionWorkflow", "DiffusionModel"):
        for name, each in world.all(kind).items():
            status = from_the_future(each.get("status") or {})
            world.edit(kind, name, status=status)
    for kind in KINDS:
        for name, each in world.all(kind).items():
            meta = copy.deepcopy(each["metadata"])
            for key in ("labels", "annotations"):
                meta[key] = {**(meta.get(key) or {}), "kubediffusion.io/from-the-future": "yes"}
            world.edit(kind, name, metadata=meta)
    for name, each in world.all("ConfigMap").items():
        told = {**json.loads(each["data"][RESIDENCY_KEY]), "fromTheFuture": 1}
        world.edit("ConfigMap", name, data={**each["data"], RESIDENCY_KEY: json.dumps(told)})
    restarted(world)
    world.settle()
    assert uids(world) == before
    assert world.status("DiffusionWorkflow", "w")["revision"] == served
    assert len(world.status("DiffusionWorkflow", "w")["draining"]) == 1
    # Nodes of this version are told by what this version knows.
    for each in world.all("ConfigMap").values():
        assert "fromTheFuture" not in each["data"][RESIDENCY_KEY]


def test_an_operator_takes_over_what_an_older_one_wrote(world: World) -> None:
    """One whose status had less in it, and whose children were not stamped."""
    before, served = uids(world), world.status("DiffusionWorkflow", "w")["revision"]
    status = world.status("DiffusionWorkflow", "w")
    kept = {key: status[key] for key in ("revision", "previousRevision", "servedSince")}
    world.edit("DiffusionWorkflow", "w", status=kept)
    for name in world.all("DiffusionModel"):
        world.edit("DiffusionModel", name, status={})
    for kind in KINDS:
        for name, each in world.all(kind).items():
            meta = {k: v for k, v in each["metadata"].items() if k != "annotations"}
            world.edit(kind, name, metadata=meta)
    restarted(world)
    world.settle()
    assert uids(world) == before
    assert world.status("DiffusionWorkflow", "w")["revision"] == served
    assert len(world.status("DiffusionWorkflow", "w")["draining"]) == 1
