# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Models on the nodes of a ModelPool, by the word of one plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kubediffusion_operator.planning.pools import RETRY_SECONDS
from kubediffusion_operator.planning.types import ModelReport, Plan
from tests.unit.planning.world import World

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
POOLED = {role: {"placement": {"pool": "p"}} for role in ENCODERS}


@pytest.fixture
def world() -> World:
    world = World()
    world.put("ModelPool", "p", {"replicas": 2, "memoryLimit": "10Gi"})
    world.workflow("w", models=POOLED)
    return world


def plan_of(world: World) -> dict[str, list[str]]:
    return {each["model"]: each["nodes"] for each in world.status("ModelPool", "p")["plan"]}


def said(world: World, pod: str, **states: Any) -> None:
    """Another answer of a pod: fields of ModelReport by identity."""
    uid = world.get("Pod", pod)["metadata"]["uid"]
    report = world.residency[uid]
    models = tuple(replace(each, **states.get(each.identity, {})) for each in report.models)
    world.residency[uid] = replace(report, models=models)


def told(made: Plan) -> dict[str, set[str]]:
    return {
        write.pod: {spec["identity"] for spec in write.content["models"]}
        for write in made.residency
    }


def test_models_go_to_the_pools_nodes_and_have_none_of_their_own(world: World) -> None:
    world.settle()
    names = {world.role("w", role) for role in ENCODERS}
    assert set(plan_of(world)) == names
    assert all(len(on) == 1 for on in plan_of(world).values())
    assert {node for on in plan_of(world).values() for node in on} == {"pool-p-0", "pool-p-1"}
    assert not names & set(world.all("Deployment"))
    assert not names & set(world.all("Service"))
    model = world.status("DiffusionModel", world.role("w", "text_encoder"))
    assert (model["replicas"], model["readyReplicas"], model["reason"]) == (1, 1, "Ready")
    assert model["selector"] == ("app.kubernetes.io/component=model-node,kubediffusion.io/pool=p")
    assert world.condition("DiffusionWorkflow", "w", "Ready")["status"] == "True"
    pool = world.status("ModelPool", "p")
    assert (pool["readyReplicas"], pool["desiredReplicas"], pool["reason"]) == (2, 2, "Ready")
    assert world.condition("ModelPool", "p", "PlanApplied")["status"] == "True"


def test_the_pools_children(world: World) -> None:
    world.settle()
    for kind in ("Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment"):
        meta = world.get(kind, "pool-p")["metadata"]
        assert meta["labels"]["kubediffusion.io/pool"] == "p"
        assert meta["ownerReferences"][0]["kind"] == "ModelPool"
    assert "pool-p" not in world.all("ConfigMap")
    env = {
        each["name"]: each.get("value")
        for each in world.get("Deployment", "pool-p")["spec"]["template"]["spec"]["containers"][0][
            "env"
        ]
    }
    assert env["KUBEDIFFUSION_MEMORY_LIMIT"] == str(10 << 30)
    # Its nodes begin empty, and a model that fails is no reason to exit.
    assert "KUBEDIFFUSION_RESIDENCY" not in env
    assert "KUBEDIFFUSION_EXIT_ON_FAILURE" not in env


def test_a_settled_pool_is_told_nothing(world: World) -> None:
    world.settle()
    made = world.plan()
    assert not made.writes
    assert not made.residency
    assert made.requeue_after is None


def test_each_change_of_the_plan_counts_and_an_equal_one_does_not(world: World) -> None:
    world.settle()
    first = world.status("ModelPool", "p")["planGeneration"]
    world.workflow("other", model="other", models=POOLED)
    world.settle()
    second = world.status("ModelPool", "p")["planGeneration"]
    assert second > first
    lora = {"name": "ink", "source": {"uri": "hf://org/ink"}}
    vae = {"placement": {"pool": "p"}}
    world.workflow("w", models={**POOLED, "transformer": vae}, loras=[lora])
    world.settle()
    third = world.status("ModelPool", "p")["planGeneration"]
    assert third > second
    # A new word on the transformer alone, as it is told: its LoRAs.
    world.workflow("w", models={**POOLED, "transformer": vae}, loras=[])
    world.settle()
    assert world.status("ModelPool", "p")["planGeneration"] == third
    world.wait(120)  # requests that name it have ended
    world.settle()
    assert world.status("ModelPool", "p")["planGeneration"] == third + 1


def test_a_node_that_knows_a_newer_plan_is_overtaken(world: World) -> None:
    """The operator died between telling nodes and writing it down."""
    world.settle()
    uid = world.get("Pod", "pool-p-0")["metadata"]["uid"]
    world.residency[uid] = replace(world.residency[uid], generation=50, error="OldGeneration")
    world.settle()
    assert world.status("ModelPool", "p")["planGeneration"] == 51
    assert world.residency[uid].generation == 51


def test_a_restarted_node_is_told_again_and_the_others_are_not(world: World) -> None:
    world.settle()
    before = plan_of(world)
    pod = world.get("Pod", "pool-p-0")
    container = {**pod["status"]["containerStatuses"][0], "restartCount": 1}
    world.edit("Pod", "pool-p-0", status={**pod["status"], "containerStatuses": [container]})
    made = world.plan()
    assert set(told(made)) == {"pool-p-0"}
    assert made.requeue_after == 2
    gone = [name for name, on in before.items() if "pool-p-0" in on]
    world.carry_out(made, limit=len(made.apply) + len(made.status))
    world.residency.pop(pod["metadata"]["uid"])
    assert all(world.status("DiffusionModel", name)["readyReplicas"] == 0 for name in gone)
    assert plan_of(world) == before


def test_a_lost_nodes_models_move_and_the_others_stay(world: World) -> None:
    world.settle()
    before = plan_of(world)
    world.delete("Pod", "pool-p-1")
    made = world.plan()
    for name, on in before.items():
        if on == ["pool-p-0"]:
            assert name in told(made)["pool-p-0"]
    assert told(made)["pool-p-0"] == set(before)


def test_a_size_that_a_node_found_out_is_kept_to(world: World) -> None:
    world.settle()
    world.sizes = {world.role("w", role): 6 << 30 for role in ENCODERS}
    for pod in ("pool-p-0", "pool-p-1"):
        said(world, pod, **{name: {"nbytes": size} for name, size in world.sizes.items()})
    world.settle()
    # Three of 6 GiB and two nodes of 10.
    assert len(plan_of(world)) == 2
    (left,) = set(world.sizes) - set(plan_of(world))
    condition = world.condition("DiffusionModel", left, "Ready")
    assert condition["reason"] == "DoesNotFit"
    assert (
        "it takes 6.0 GiB and no node of ModelPool p (2 of 10.0 GiB each)" in (condition["message"])
    )
    applied = world.condition("ModelPool", "p", "PlanApplied")
    assert (applied["reason"], left in applied["message"]) == ("DoesNotFit", True)
    assert world.condition("DiffusionWorkflow", "w", "Ready")["reason"] == "DoesNotFit"
    world.set_spec("ModelPool", "p", replicas=3)
    world.settle()
    assert len(plan_of(world)) == 3


def test_a_node_that_has_no_room_says_how_much_it_takes(world: World) -> None:
    world.settle()
    name = world.role("w", "text_encoder_3")
    (pod,) = plan_of(world)[name]
    failed = {"state": "FAILED", "reason": "OutOfMemory", "message": "no", "nbytes": 11 << 30}
    said(world, pod, **{name: failed})
    world.settle()
    assert name not in plan_of(world)
    assert world.condition("DiffusionModel", name, "Ready")["reason"] == "DoesNotFit"


def test_a_model_that_fails_to_load_says_why_and_is_tried_again(world: World) -> None:
    world.settle()
    name = world.role("w", "text_encoder")
    (pod,) = plan_of(world)[name]
    said(world, pod, **{name: {"state": "FAILED", "reason": "BadWeights", "message": "torn"}})
    made = world.settle()
    assert made.requeue_after == RETRY_SECONDS
    status = world.status("DiffusionModel", name)
    assert status["lastFailure"]["reason"] == "BadWeights"
    assert status["lastFailure"]["time"] == world.time
    assert world.condition("DiffusionWorkflow", "w", "Ready")["reason"] == "BadWeights"
    assert world.condition("ModelPool", "p", "PlanApplied")["reason"] == "LoadFailed"
    before = world.status("ModelPool", "p")["planGeneration"]
    world.wait(RETRY_SECONDS - 1)
    assert not world.plan().writes
    world.wait(1)
    made = world.plan()
    assert told(made)[pod] >= {name}
    world.settle()
    assert world.status("ModelPool", "p")["planGeneration"] == before + 1
    assert world.condition("DiffusionWorkflow", "w", "Ready")["status"] == "True"


def test_while_a_node_loads_the_plan_comes_back(world: World) -> None:
    world.settle()
    name = world.role("w", "text_encoder")
    (pod,) = plan_of(world)[name]
    said(world, pod, **{name: {"state": "LOADING"}})
    made = world.plan()
    assert set(told(made)) == {pod}
    assert made.requeue_after == 2
    world.carry_out(made, limit=made.writes)
    assert world.condition("ModelPool", "p", "PlanApplied")["reason"] == "Loading"


def test_a_pool_that_is_not_there(world: World) -> None:
    world.delete("ModelPool", "p")
    world.settle()
    name = world.role("w", "text_encoder")
    condition = world.condition("DiffusionModel", name, "Ready")
    assert (condition["reason"], "make it" in condition["message"]) == ("PoolNotFound", True)
    assert world.condition("DiffusionWorkflow", "w", "Ready")["reason"] == "PoolNotFound"


def test_a_pool_without_nodes(world: World) -> None:
    world.set_spec("ModelPool", "p", replicas=0)
    world.settle()
    name = world.role("w", "text_encoder")
    assert world.condition("DiffusionModel", name, "Ready")["reason"] == "NoNodes"
    assert world.condition("ModelPool", "p", "Ready")["status"] == "True"


def test_copies_by_demand(world: World) -> None:
    scaling = {"minReplicas": 1, "maxReplicas": 4}
    models = {**POOLED, "text_encoder_3": {"placement": {"pool": "p"}, "scaling": scaling}}
    world.workflow("w", models=models)
    world.settle()
    name = world.role("w", "text_encoder_3")
    world.set_spec("DiffusionModel", name, replicas=4)
    world.settle()
    assert plan_of(world)[name] == ["pool-p-0", "pool-p-1"]
    assert world.status("DiffusionModel", name)["desiredReplicas"] == 4
    world.set_spec("DiffusionModel", name, replicas=1)
    world.settle()
    assert len(plan_of(world)[name]) == 1


def test_on_its_way_into_a_pool_a_model_keeps_its_nodes(world: World) -> None:
    world.workflow("w")
    world.settle()
    name = world.role("w", "text_encoder")
    assert name in world.all("Deployment")
    world.workflow("w", models=POOLED)
    world.carry_out(world.plan())
    made = world.plan()
    assert not made.delete
    world.settle()
    assert name not in world.all("Deployment")
    assert name in plan_of(world)


def test_a_pools_pods_that_fail(world: World) -> None:
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    container = {"name": "node", "restartCount": 0, "state": waiting}
    world.broken["pool-p"] = {
        "phase": "Pending",
        "podIP": "",
        "containerStatuses": [container],
        "conditions": [],
    }
    world.settle()
    ready = world.condition("ModelPool", "p", "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "ImagePullBackOff")
    assert world.status("ModelPool", "p")["lastFailure"]["reason"] == "ImagePullBackOff"
    assert world.status("ModelPool", "p")["plan"] == []
    name = world.role("w", "text_encoder")
    assert world.condition("DiffusionModel", name, "Ready")["reason"] == "NoNodes"


def test_a_report_of_an_earlier_life_counts_for_nothing(world: World) -> None:
    world.settle()
    uid = world.get("Pod", "pool-p-0")["metadata"]["uid"]
    world.residency[uid] = replace(
        world.residency[uid], restarts=9, models=(ModelReport("x", "READY"),)
    )
    assert "pool-p-0" in told(world.plan())
