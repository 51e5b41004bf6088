# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""ControlNets stand on the nodes of the transformers that they help."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kubediffusion.scheduling.fleet import NodeState
from kubediffusion.scheduling.placement import PlacementTask, place
from kubediffusion.scheduling.profiles import Profiles
from kubediffusion_operator.planning import PlanCache
from kubediffusion_operator.planning.residency import RETRY_SECONDS
from kubediffusion_operator.planning.types import Object, Plan, ResolutionError
from tests.unit.planning.world import World

EDGES = {"name": "edges", "source": {"uri": "hf://org/edges"}}
DEPTH = {"name": "depth", "source": {"uri": "hf://org/depth"}}
CHILDREN = ("ConfigMap", "Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment")
GIB = 1 << 30


@pytest.fixture
def world() -> World:
    world = World()
    world.workflow("w", controlNets=[EDGES])
    world.settle()
    return world


def hosted(world: World, model: str) -> list[str]:
    """What the model's own nodes begin with."""
    text = world.get("ConfigMap", model)["data"]["residency.json"]
    return [each["identity"] for each in json.loads(text)["models"]]


def told(made: Plan, pod: str) -> list[str] | None:
    """What a plan tells one pod."""
    for write in made.residency:
        if write.pod == pod:
            return [each["identity"] for each in write.content["models"]]
    return None


def says(world: World, pod: str, model: str, **fields: Any) -> None:
    """Another answer of a pod about one model."""
    uid = world.get("Pod", pod)["metadata"]["uid"]
    report = world.residency[uid]
    models = tuple(
        replace(each, **fields) if each.identity == model else each for each in report.models
    )
    world.residency[uid] = replace(report, models=models)


def columns(world: World, model: str) -> tuple[int, int, int, str]:
    """READY, REPLICAS, DESIRED, REASON of `kubectl get dmodel`."""
    status = world.status("DiffusionModel", model)
    counts = ("readyReplicas", "replicas", "desiredReplicas")
    return (*(status[each] for each in counts), status["reason"])  # type: ignore[return-value]


def container(world: World, model: str) -> Object:
    template = world.get("Deployment", model)["spec"]["template"]
    return template["spec"]["containers"][0]


def serving(world: World) -> list[NodeState]:
    """The nodes as a gateway sees them: each with what it said is ready."""
    return [
        NodeState(
            address=name,
            node_id=name,
            incarnation=name,
            host_id=name,
            fingerprint="f",
            ready=frozenset(
                each.identity
                for each in world.residency[pod["metadata"]["uid"]].models
                if each.state == "READY"
            ),
        )
        for name, pod in world.all("Pod").items()
    ]


def test_a_request_with_control_can_be_placed(world: World) -> None:
    """The gateway wants the ControlNet where the transformer is; the operator puts it there."""
    dit, edges = world.role("w", "transformer"), world.role("w", "controlnet.edges")
    task = PlacementTask(dit, "denoise", helpers=(edges,))
    placed = place(task, serving(world), Profiles(), 0.0)
    assert placed is not None
    assert placed.address == f"{dit}-0"


def test_a_controlnet_has_no_nodes_of_its_own(world: World) -> None:
    dit, edges = world.role("w", "transformer"), world.role("w", "controlnet.edges")
    assert hosted(world, dit) == [dit, edges]
    for kind in CHILDREN:
        assert edges not in world.all(kind)
    assert columns(world, edges) == columns(world, dit) == (1, 1, 1, "Ready")
    status = world.status("DiffusionModel", edges)
    assert status["hostedBy"] == [dit]
    assert status["selector"] == world.status("DiffusionModel", dit)["selector"]
    assert status["digest"] == "digest of hf://org/edges"
    assert dit in world.condition("DiffusionModel", edges, "Ready")["message"]
    assert world.condition("DiffusionModel", edges, "CoHosted")["reason"] == "OnHostsNodes"
    assert not world.condition("DiffusionModel", dit, "CoHosted")
    assert world.status("DiffusionWorkflow", "w")["ready"] == "6/6"


def test_one_more_reaches_running_nodes_without_new_pods(world: World) -> None:
    dit = world.role("w", "transformer")
    before = world.get("Deployment", dit)
    pod = world.get("Pod", f"{dit}-0")["metadata"]["uid"]
    world.workflow("w", controlNets=[EDGES, DEPTH])
    world.settle()
    depth = world.role("w", "controlnet.depth")
    assert set(hosted(world, dit)) == {dit, depth, world.role("w", "controlnet.edges")}
    assert world.get("Deployment", dit)["metadata"]["generation"] == 1
    assert world.get("Deployment", dit)["spec"] == before["spec"]
    assert world.get("Pod", f"{dit}-0")["metadata"]["uid"] == pod
    assert columns(world, depth) == (1, 1, 1, "Ready")


def test_a_revision_waits_for_the_controlnet_that_it_adds(world: World) -> None:
    dit, old = world.role("w", "transformer"), world.status("DiffusionWorkflow", "w")["revision"]
    world.workflow("w", controlNets=[EDGES, DEPTH])
    for _ in range(3):  # its model is made, its nodes are told
        made = world.plan()
        world.carry_out(made)
    depth = world.role("w", "controlnet.depth")
    says(world, f"{dit}-0", depth, state="LOADING")
    world.carry_out(world.plan(), limit=0)
    made = world.plan()
    assert told(made, f"{dit}-0")
    assert made.requeue_after == 2
    status = made.status.get(("DiffusionWorkflow", "w")) or world.status("DiffusionWorkflow", "w")
    assert status["revision"] == old
    assert status["ready"] == "6/7"
    # Meanwhile the old one serves: what it needs is there.
    ready = next(each for each in status["conditions"] if each["type"] == "Ready")
    assert ready["status"] == "True"
    world.settle()
    assert world.status("DiffusionWorkflow", "w")["revision"] != old


def test_one_that_is_taken_out_leaves_when_its_requests_have_ended(world: World) -> None:
    dit, edges = world.role("w", "transformer"), world.role("w", "controlnet.edges")
    world.workflow("w")
    world.settle()
    assert edges in hosted(world, dit)
    world.wait(121)
    world.settle()
    assert hosted(world, dit) == [dit]
    assert edges not in world.all("DiffusionModel")
    assert world.status("DiffusionWorkflow", "w")["ready"] == "5/5"


def test_it_scales_with_its_transformer(world: World) -> None:
    dit, edges = world.role("w", "transformer"), world.role("w", "controlnet.edges")
    world.set_spec("DiffusionModel", dit, replicas=3)
    world.settle()
    assert columns(world, edges) == (3, 3, 3, "Ready")
    world.set_spec("DiffusionModel", dit, replicas=0)
    world.settle()
    assert columns(world, edges) == columns(world, dit) == (0, 0, 0, "ScaledToZero")
    assert world.status("DiffusionWorkflow", "w")["ready"] == "6/6"
    # Nobody sets a number for it, so that an HPA that points at it finds none.
    assert "replicas" not in world.get("DiffusionModel", edges)["spec"]


def test_kubectl_scale_of_it_says_what_to_scale(world: World) -> None:
    dit, edges = world.role("w", "transformer"), world.role("w", "controlnet.edges")
    world.set_spec("DiffusionModel", edges, replicas=5)
    world.settle()
    assert columns(world, edges) == (1, 1, 1, "Ready")
    condition = world.condition("DiffusionModel", edges, "CoHosted")
    assert condition["reason"] == "FieldsIgnored"
    assert "spec.replicas change nothing" in condition["message"]
    assert dit in condition["message"]
    events = [each for each in world.events if each.reason == "FieldsIgnored"]
    assert [(each.about.name, each.type) for each in events] == [(edges, "Warning")]
    assert world.get("DiffusionModel", edges)["spec"]["replicas"] == 5
    world.set_spec("DiffusionModel", edges, replicas=1)
    world.settle()
    assert world.condition("DiffusionModel", edges, "CoHosted")["reason"] == "OnHostsNodes"


def test_what_a_workflow_says_of_its_nodes_is_said_to_be_its_transformers(world: World) -> None:
    idle = {"scaling": {"mode": "external"}, "drainSeconds": 5, "podTemplate": {"spec": {}}}
    world.workflow("w", controlNets=[EDGES], models={"controlnet.edges": idle})
    world.settle()
    conflict = world.condition("DiffusionWorkflow", "w", "OverrideConflict")
    assert conflict["reason"] == "HostDecides"
    for field in ("scaling", "drainSeconds", "podTemplate"):
        assert f"models.controlnet.edges.{field}" in conflict["message"]
    assert "say it under models.transformer" in conflict["message"]
    spec = world.get("DiffusionModel", world.role("w", "controlnet.edges"))["spec"]
    assert not {"scaling", "podTemplate"} & set(spec)
    assert spec["drainSeconds"] == 120


def test_two_transformers_host_one_that_they_share(world: World) -> None:
    world.workflow("other", model="tuned", controlNets=[EDGES])
    world.settle()
    edges = world.role("w", "controlnet.edges")
    assert world.role("other", "controlnet.edges") == edges
    hosts = sorted((world.role("w", "transformer"), world.role("other", "transformer")))
    assert world.status("DiffusionModel", edges)["hostedBy"] == hosts
    for host in hosts:
        assert hosted(world, host) == [host, edges]
    assert columns(world, edges) == (2, 2, 2, "Ready")
    world.delete("DiffusionWorkflow", "other")
    world.settle()
    assert columns(world, edges) == (1, 1, 1, "Ready")


def test_a_workflow_is_ready_when_its_own_transformer_has_it(world: World) -> None:
    """That it is ready beside another one serves nobody here, and the other way round."""
    world.workflow("other", model="tuned", controlNets=[EDGES])
    world.settle()
    edges, here = world.role("w", "controlnet.edges"), world.role("w", "transformer")
    says(world, f"{here}-0", edges, state="FAILED", reason="OutOfMemory", message="2 GiB; no room")
    world.settle()
    ready = world.condition("DiffusionWorkflow", "w", "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "OutOfMemory")
    assert "controlnet.edges" in ready["message"]
    assert "2 GiB; no room" in ready["message"]
    assert world.status("DiffusionWorkflow", "w")["ready"] == "5/6"
    assert world.condition("DiffusionWorkflow", "other", "Ready")["status"] == "True"
    assert world.condition("DiffusionWorkflow", "other", "Degraded")["status"] == "False"
    assert columns(world, edges)[:3] == (1, 2, 2)
    assert world.condition("DiffusionModel", edges, "Degraded")["reason"] == "OutOfMemory"


def test_a_workflow_without_it_does_not_care(world: World) -> None:
    world.workflow("plain")
    world.settle()
    edges, dit = world.role("w", "controlnet.edges"), world.role("w", "transformer")
    assert world.role("plain", "transformer") == dit
    says(world, f"{dit}-0", edges, state="FAILED", reason="BadWeights", message="torn")
    world.settle()
    assert world.condition("DiffusionWorkflow", "plain", "Ready")["status"] == "True"
    assert world.condition("DiffusionWorkflow", "w", "Ready")["reason"] == "BadWeights"


def test_one_that_failed_is_tried_again(world: World) -> None:
    edges, dit = world.role("w", "controlnet.edges"), world.role("w", "transformer")
    says(world, f"{dit}-0", edges, state="FAILED", reason="SourceNotFound", message="no such repo")
    world.wait(RETRY_SECONDS - 1)
    made = world.settle()
    assert made.requeue_after == 1
    world.wait(1)
    assert told(world.plan(), f"{dit}-0") == [dit, edges]
    world.settle()
    assert world.condition("DiffusionWorkflow", "w", "Ready")["status"] == "True"


def test_what_keeps_the_transformer_from_starting_is_said_of_both(world: World) -> None:
    edges, dit = world.role("w", "controlnet.edges"), world.role("w", "transformer")
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    container = {"name": "node", "restartCount": 1, "state": waiting}
    world.broken[dit] = {"phase": "Pending", "containerStatuses": [container]}
    world.settle()
    condition = world.condition("DiffusionModel", edges, "Ready")
    assert condition["reason"] == "ImagePullBackOff"
    assert condition["message"].startswith(f"it runs on the nodes of {dit}: ")
    assert "lastFailure" not in world.status("DiffusionModel", edges)
    ready = world.condition("DiffusionWorkflow", "w", "Ready")
    assert ready["message"].startswith("transformer (")


# ---------------------------------------------------------------- room on the nodes


def with_memory(limit: str | None, request: str | None = None) -> dict[str, Any]:
    kinds = {"limits": limit, "requests": request}
    return {"resources": {kind: {"memory": size} for kind, size in kinds.items() if size}}


def test_its_memory_is_added_to_its_transformers_and_the_pods_are_rolled(world: World) -> None:
    models = {"transformer": with_memory("8Gi", "6Gi")}
    world.workflow("w", controlNets=[EDGES], models=models)
    world.settle()
    dit, edges = world.role("w", "transformer"), world.role("w", "controlnet.edges")
    old = world.get("Pod", f"{dit}-0")["metadata"]["uid"]
    wanted = {"limits": {"memory": "2Gi", "cpu": "4", "nvidia.com/gpu": "1"}}
    models["controlnet.edges"] = {"resources": wanted}
    world.workflow("w", controlNets=[EDGES, DEPTH], models=models)
    world.carry_out(world.plan())  # a revision
    world.carry_out(world.plan())  # its models
    made = world.plan()
    assert dit in {each["metadata"]["name"] for each in made.apply if each["kind"] == "Deployment"}
    # The pod that is there has no room for one more, and its own go on as they are.
    assert told(made, f"{dit}-0") is None
    world.settle()
    resources = container(world, dit)["resources"]
    # CPUs and devices are used in turn.
    assert resources == {"limits": {"memory": "10240Mi"}, "requests": {"memory": "8192Mi"}}
    assert world.get("Pod", f"{dit}-0")["metadata"]["uid"] != old
    assert columns(world, edges) == (1, 1, 1, "Ready")


@pytest.mark.parametrize(
    ("host", "helper", "expected"),
    [
        ({}, with_memory("1Gi"), {"requests": {"memory": "1024Mi"}}),
        (
            with_memory("4Gi"),
            with_memory(None, "1Gi"),
            {"limits": {"memory": "5120Mi"}, "requests": {"memory": "5120Mi"}},
        ),
        (
            with_memory("4Gi", "2Gi"),
            with_memory("2Gi", "1Gi"),
            {"limits": {"memory": "6144Mi"}, "requests": {"memory": "3072Mi"}},
        ),
    ],
)
def test_limits_that_nobody_set_are_not_set(host: Any, helper: Any, expected: Any) -> None:
    world = World()
    world.workflow(
        "w", controlNets=[EDGES], models={"transformer": host, "controlnet.edges": helper}
    )
    world.settle()
    assert container(world, world.role("w", "transformer"))["resources"] == expected


def test_nodes_may_download_what_they_host() -> None:
    world = World()
    world.workflow("w", source={"uri": "file:///models/base"}, controlNets=[EDGES])
    world.settle()
    policy = world.get("NetworkPolicy", world.role("w", "transformer"))
    assert any(
        rule.get("ports") == [{"port": 443, "protocol": "TCP"}] for rule in policy["spec"]["egress"]
    )
    policy = world.get("NetworkPolicy", world.role("w", "vae"))
    assert not any(
        rule.get("ports") == [{"port": 443, "protocol": "TCP"}] for rule in policy["spec"]["egress"]
    )


# ---------------------------------------------------------------- pools

IN_POOL = {"placement": {"pool": "p"}}


def pooled(replicas: int = 2, limit: str = "10Gi", **models: Any) -> World:
    world = World()
    world.put("ModelPool", "p", {"replicas": replicas, "memoryLimit": limit})
    world.workflow("w", controlNets=[EDGES], models={"transformer": IN_POOL, **models})
    world.settle()
    return world


def planned(world: World) -> dict[str, list[str]]:
    return {each["model"]: each["nodes"] for each in world.status("ModelPool", "p")["plan"]}


@pytest.mark.parametrize("said", [{}, IN_POOL])
def test_in_a_pool_it_is_on_its_transformers_node(said: Any) -> None:
    world = pooled(**{"controlnet.edges": said})
    dit, edges = world.role("w", "transformer"), world.role("w", "controlnet.edges")
    assert planned(world)[dit] == planned(world)[edges]
    task = PlacementTask(dit, "denoise", helpers=(edges,))
    assert place(task, serving(world), Profiles(), 0.0) is not None
    assert columns(world, edges) == (1, 1, 1, "Ready")
    assert world.condition("DiffusionWorkflow", "w", "Ready")["status"] == "True"
    assert not world.condition("DiffusionWorkflow", "w", "OverrideConflict")


def test_another_pool_than_its_transformers_is_a_conflict() -> None:
    world = pooled(**{"controlnet.edges": {"placement": {"pool": "q"}}})
    conflict = world.condition("DiffusionWorkflow", "w", "OverrideConflict")
    assert "models.controlnet.edges.placement" in conflict["message"]
    dit, edges = world.role("w", "transformer"), world.role("w", "controlnet.edges")
    assert planned(world)[dit] == planned(world)[edges]


def test_both_are_one_item_where_room_is_scarce() -> None:
    world = pooled(vae=IN_POOL)
    dit, edges, vae = (world.role("w", r) for r in ("transformer", "controlnet.edges", "vae"))
    world.sizes = {dit: 6 * GIB, edges: 3 * GIB, vae: 5 * GIB}
    for pod in ("pool-p-0", "pool-p-1"):
        for model, size in world.sizes.items():
            says(world, pod, model, nbytes=size)
    world.settle()
    assert planned(world)[dit] == planned(world)[edges] != planned(world)[vae]


def test_one_that_does_not_fit_keeps_nobody_else_from_serving() -> None:
    world = pooled(replicas=1)
    dit, edges = world.role("w", "transformer"), world.role("w", "controlnet.edges")
    world.workflow("plain", models={"transformer": IN_POOL})
    world.sizes = {dit: 8 * GIB, edges: 3 * GIB}
    for model, size in world.sizes.items():
        says(world, "pool-p-0", model, nbytes=size)
    world.settle()
    assert planned(world) == {dit: ["pool-p-0"]}
    assert world.condition("DiffusionWorkflow", "plain", "Ready")["status"] == "True"
    ready = world.condition("DiffusionWorkflow", "w", "Ready")
    assert ready["reason"] == "DoesNotFit"
    assert f"no node of ModelPool p has room for it beside {dit}" in ready["message"]
    applied = world.condition("ModelPool", "p", "PlanApplied")
    assert (applied["reason"], edges in applied["message"]) == ("DoesNotFit", True)
    world.set_spec("ModelPool", "p", memoryLimit="12Gi")
    world.settle()
    assert planned(world) == {dit: ["pool-p-0"], edges: ["pool-p-0"]}
    assert world.condition("DiffusionWorkflow", "w", "Ready")["status"] == "True"


def test_transformers_with_and_without_a_pool_host_it_both() -> None:
    world = pooled()
    world.workflow("other", model="tuned", controlNets=[EDGES])
    world.settle()
    edges, alone = world.role("w", "controlnet.edges"), world.role("other", "transformer")
    assert hosted(world, alone) == [alone, edges]
    assert planned(world)[edges] == planned(world)[world.role("w", "transformer")]
    assert columns(world, edges) == (2, 2, 2, "Ready")
    # No selector finds the pods of both.
    assert world.status("DiffusionModel", edges)["selector"] == ""


# ---------------------------------------------------------------- made by hand; what went before


def by_hand(world: World, role: str) -> str:
    """The model of a role, made by a person before any workflow."""
    plan = World()
    plan.workflow("w", controlNets=[EDGES])
    plan.settle()
    name = plan.role("w", role)
    spec = plan.get("DiffusionModel", name)["spec"]
    world.put("DiffusionModel", name, {k: v for k, v in spec.items() if k != "replicas"})
    return name


def test_one_made_by_hand_waits_for_a_workflow_and_is_hosted_then() -> None:
    world = World()
    edges = by_hand(world, "controlnet.edges")
    world.settle()
    assert columns(world, edges) == (0, 0, 0, "NotHosted")
    assert "spec.controlNets" in world.condition("DiffusionModel", edges, "Ready")["message"]
    assert edges not in world.all("Deployment")
    world.workflow("w", controlNets=[EDGES])
    world.settle()
    dit = world.role("w", "transformer")
    assert hosted(world, dit) == [dit, edges]
    assert columns(world, edges) == (1, 1, 1, "Ready")
    world.delete("DiffusionWorkflow", "w")
    world.settle()
    assert columns(world, edges) == (0, 0, 0, "NotHosted")


def test_a_transformer_made_by_hand_hosts_too() -> None:
    world = World()
    dit = by_hand(world, "transformer")
    world.settle()
    assert hosted(world, dit) == [dit]
    world.workflow("w", controlNets=[EDGES])
    world.settle()
    assert hosted(world, dit) == [dit, world.role("w", "controlnet.edges")]
    assert world.status("DiffusionWorkflow", "w")["ready"] == "6/6"


def test_scaling_of_one_made_by_hand_is_said_to_be_idle() -> None:
    world = World()
    edges = by_hand(world, "controlnet.edges")
    world.set_spec("DiffusionModel", edges, scaling={"mode": "external"})
    world.workflow("w", controlNets=[EDGES])
    world.settle()
    condition = world.condition("DiffusionModel", edges, "CoHosted")
    assert condition["reason"] == "FieldsIgnored"
    assert "spec.scaling change nothing" in condition["message"]


def test_nodes_that_an_older_operator_gave_it_go(world: World) -> None:
    dit, edges = world.role("w", "transformer"), world.role("w", "controlnet.edges")
    world.set_spec("DiffusionModel", edges, replicas=1)
    owner = world.get("DiffusionModel", edges)["metadata"]
    for kind in CHILDREN:
        old = json.loads(json.dumps(world.get(kind, dit)))
        old["metadata"]["name"] = edges
        old["metadata"]["ownerReferences"][0] |= {"name": edges, "uid": owner["uid"]}
        world.apply(old)
    world.settle()
    for kind in CHILDREN:
        assert edges not in world.all(kind)
    assert columns(world, edges) == (1, 1, 1, "Ready")
    assert world.condition("DiffusionModel", edges, "CoHosted")["reason"] == "OnHostsNodes"


def test_a_workflow_that_cannot_be_read_keeps_what_it_has(world: World) -> None:
    """Another version's revision, say: its models stay, and where they are."""
    dit, edges = world.role("w", "transformer"), world.role("w", "controlnet.edges")
    for name in world.all("ControllerRevision"):
        world.edit("ControllerRevision", name, data={"from": "elsewhere"})
    world.resolutions = {key: ResolutionError("Offline", "no network") for key in world.resolutions}
    world.cache = PlanCache()
    world.settle()
    assert hosted(world, dit) == [dit, edges]
    assert columns(world, edges) == (1, 1, 1, "Ready")


def test_replacing_a_workflow_takes_its_controlnet_along(world: World) -> None:
    world.workflow("w", controlNets=[EDGES], strategy="Replace")
    world.settle()
    old, edges = world.role("w", "transformer"), world.role("w", "controlnet.edges")
    world.workflow("w", model="tuned", controlNets=[EDGES], strategy="Replace")
    world.settle()
    world.wait(121)
    world.settle()
    new = world.role("w", "transformer")
    assert new != old
    assert old not in world.all("Deployment")
    assert hosted(world, new) == [new, edges]
    assert world.status("DiffusionWorkflow", "w")["ready"] == "6/6"
