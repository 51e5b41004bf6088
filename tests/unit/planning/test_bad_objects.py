# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One bad object never stops the rest, and statuses say what they say once."""

from __future__ import annotations

from typing import Any

import pytest

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
        assert any(e.about.name == "bad" and e.type == "Warning" for e in world.events) or (
            world.condition(kind, "bad", "Ready")["status"] == "False"
        )


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
