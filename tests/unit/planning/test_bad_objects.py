# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One bad object never stops the rest, and statuses say what they say once."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from kubediffusion_operator.planning import PlanCache
from tests.unit.planning.world import World

# What no API server with our CRDs would let in; one of another version might.
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "a workflow without a pipeline": ("DiffusionWorkflow", {}),
    "a workflow of the future": (
        "DiffusionWorkflow",
        {"pipeline": {"preset": "Flux9", "source": {"uri": "hf://org/name"}}},
    ),
    "a workflow that breaks a rule": (
        "DiffusionWorkflow",
        {"pipeline": {"source": {"uri": "hf://org/name"}}},
    ),
    "a model without a source": ("DiffusionModel", {"family": "sd3", "component": "vae"}),
    "a pool with a memory that is none": ("ModelPool", {"memoryLimit": "lots", "replicas": 1}),
}


@pytest.mark.parametrize(("kind", "spec"), BAD.values(), ids=BAD.keys())
def test_a_bad_object_stops_nobody(kind: str, spec: dict[str, Any]) -> None:
    world = World()
    world.workflow("before")
    world.put(kind, "bad", spec)
    world.settle()
    world.workflow("later", model="other")
    world.settle()
    for name in ("before", "later"):
        assert world.condition("DiffusionWorkflow", name, "Ready")["status"] == "True"
    if kind == "DiffusionWorkflow":
        resolved = world.condition(kind, "bad", "Resolved")
        assert (resolved["status"], resolved["reason"]) == ("False", "InvalidWorkflow")
        assert "spec.pipeline" in resolved["message"]
    else:
        assert world.condition(kind, "bad", "Ready")["status"] == "False"
        assert any(e.about.name == "bad" and e.type == "Warning" for e in world.events)


def test_what_a_workflow_has_stays_when_it_becomes_unreadable() -> None:
    world = World()
    world.workflow("w")
    world.settle()
    before = set(world.all("Deployment"))
    world.put("DiffusionWorkflow", "w", {"pipeline": {"preset": "Flux9", "source": {"uri": "x"}}})
    world.settle()
    assert set(world.all("Deployment")) == before
    assert world.condition("DiffusionWorkflow", "w", "Ready")["status"] == "True"
    assert world.condition("DiffusionWorkflow", "w", "Degraded")["reason"] == "InvalidWorkflow"


def unforeseen(*_: object) -> Any:
    raise KeyError("unforeseen")


@pytest.mark.parametrize(
    ("module", "function", "kind"),
    [
        ("scene", "history", "DiffusionWorkflow"),
        ("scene", "wanted_object", "DiffusionWorkflow"),
        ("plan", "workflow_status", "DiffusionWorkflow"),
        ("scene", "standing", "DiffusionModel"),
        ("household", "own_content", "DiffusionModel"),
        ("plan", "model_status", "DiffusionModel"),
        ("scene", "planned", "ModelPool"),
        ("household", "_pool", "ModelPool"),
        ("plan", "pool_status", "ModelPool"),
    ],
)
def test_what_cannot_be_planned_says_so_and_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, module: str, function: str, kind: str
) -> None:
    what = function, unforeseen
    world = World()
    world.put("ModelPool", "pool", {"replicas": 1, "memoryLimit": "8Gi"})
    world.workflow("w", models={"vae": {"placement": {"pool": "pool"}}})
    world.settle()
    before = set(world.objects)
    revision = world.status("DiffusionWorkflow", "w")["revision"]
    world.events.clear()
    with monkeypatch.context() as broken:
        broken.setattr(import_module(f"kubediffusion_operator.planning.{module}"), *what)
        world.cache = PlanCache()
        if kind == "DiffusionWorkflow":
            world.workflow(
                "w", models={"vae": {"placement": {"pool": "pool"}}}, slo={"deadlineSeconds": 5}
            )
        made = world.plan()
        world.settle()
        assert before <= set(world.objects)
        about = sorted(each.about.name for each in made.errors)
        # A model of a pool has no nodes of its own to be told anything.
        spared = {world.role("w", "vae")} if function == "own_content" else set[str]()
        assert {*about} == {name for k, name in world.objects if k == kind} - spared
        for name in about:
            ready = world.condition(kind, name, "Ready")
            assert (ready["status"], ready["reason"]) == ("False", "PlanningFailed")
            assert "KeyError: 'unforeseen'" in ready["message"]
            generation = world.get(kind, name)["metadata"]["generation"]
            assert ready["observedGeneration"] == generation
            assert world.status(kind, name)["observedGeneration"] == generation
            assert [e.reason for e in world.events if e.about.name == name] == ["PlanningFailed"]
        assert all("in unforeseen" in each.traceback for each in made.errors)
        # Gateways go on with what they have.
        assert world.status("DiffusionWorkflow", "w")["revision"] == revision
    world.cache = PlanCache()
    assert not world.plan().errors
    world.settle()
    assert world.condition(kind, about[0], "Ready")["status"] == "True"


def test_times_of_conditions_change_with_their_status_alone() -> None:
    world = World()
    world.workflow("w")
    world.settle()
    first = world.condition("DiffusionWorkflow", "w", "Ready")
    world.wait(60)
    world.workflow("w", slo={"deadlineSeconds": 5})
    world.settle()
    second = world.condition("DiffusionWorkflow", "w", "Ready")
    assert second["lastTransitionTime"] == first["lastTransitionTime"]
    assert (first["observedGeneration"], second["observedGeneration"]) == (1, 2)
    world.unready.add(world.role("w", "vae"))
    world.settle()
    assert world.condition("DiffusionWorkflow", "w", "Ready")["lastTransitionTime"] == world.time


def test_each_change_is_told_by_one_event() -> None:
    world = World()
    world.workflow("w")
    world.settle()
    about = [(e.about.kind, e.reason) for e in world.events]
    assert about.count(("DiffusionWorkflow", "Ready")) == 1
    assert about.count(("DiffusionModel", "Ready")) == 5
    assert len(about) == 6
    world.wait(3600)
    world.settle()
    assert len(world.events) == 6


def test_what_the_autoscaler_writes_is_left_alone() -> None:
    world = World()
    world.workflow("w")
    world.settle()
    name = world.role("w", "transformer")
    status = world.status("DiffusionModel", name)
    theirs = {
        "type": "MetricsAvailable",
        "status": "False",
        "reason": "MetricsStale",
        "message": "",
        "lastTransitionTime": world.time,
        "observedGeneration": 1,
    }
    world.edit(
        "DiffusionModel",
        name,
        status={
            **status,
            "conditions": [theirs, *status["conditions"]],
            "scalingHistory": [{"toReplicas": 1}],
        },
    )
    assert not world.plan().writes


def test_the_endpoint_is_told() -> None:
    world = World()
    gateway = world.config.gateway.model_copy(
        update={"endpoint": "http://gateway.{namespace}.svc:8080"}
    )
    world.config = world.config.model_copy(update={"gateway": gateway})
    world.workflow("w")
    world.settle()
    assert world.status("DiffusionWorkflow", "w")["endpoint"] == "http://gateway.team.svc:8080"
