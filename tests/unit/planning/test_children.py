# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What serves a model: its pods, its Service, who may reach it, how many there are."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf import json_format

from kubediffusion.v1alpha1 import node_pb2
from kubediffusion_operator.config import OperatorConfig
from tests.unit.planning.world import World

KINDS = ("ConfigMap", "Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment")


def world_of(**config: Any) -> World:
    text = json.dumps({"image": "registry.example/node:1", **config})
    return World(OperatorConfig.model_validate_json(text))


def served(world: World, **override: Any) -> str:
    """A workflow with an override of its transformer; that model's name."""
    world.workflow("w", models={"transformer": override} if override else {})
    world.settle()
    return world.role("w", "transformer")


def pod_of(world: World, name: str) -> dict[str, Any]:
    return world.get("Deployment", name)["spec"]["template"]["spec"]


def node_of(world: World, name: str) -> dict[str, Any]:
    return next(c for c in pod_of(world, name)["containers"] if c["name"] == "node")


def env_of(world: World, name: str) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in node_of(world, name)["env"]}


def test_all_children_have_the_models_name_labels_and_owner() -> None:
    world = world_of()
    name = served(world)
    uid = world.get("DiffusionModel", name)["metadata"]["uid"]
    for kind in KINDS:
        meta = world.get(kind, name)["metadata"]
        assert meta["labels"] == {
            "app.kubernetes.io/managed-by": "kubediffusion",
            "app.kubernetes.io/component": "model-node",
            "kubediffusion.io/model": name,
        }
        (owner,) = meta["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == (uid, True)
        assert "finalizers" not in meta


def test_the_restricted_level_of_pod_security() -> None:
    world = world_of()
    name = served(world)
    pod, node = pod_of(world, name), node_of(world, name)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 65532
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert node["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all("hostPath" not in volume for volume in pod["volumes"])
    assert {m["mountPath"] for m in node["volumeMounts"]} == {
        "/tmp",
        "/cache",
        "/etc/kubediffusion",
    }


def test_a_node_is_told_where_it_is_and_what_to_begin_with() -> None:
    world = world_of(device="cuda:0")
    name = served(world, drainSeconds=30)
    env = env_of(world, name)
    assert env["KUBEDIFFUSION_ADDRESS"] == "0.0.0.0:7070"
    assert env["KUBEDIFFUSION_ADVERTISE"] == "$(POD_IP):7070"
    # A variable is filled into those after it alone.
    names = list(env)
    assert names.index("POD_IP") < names.index("KUBEDIFFUSION_ADVERTISE")
    assert env["KUBEDIFFUSION_DEVICE"] == "cuda:0"
    assert env["KUBEDIFFUSION_DRAIN_SECONDS"] == "30"
    assert env["KUBEDIFFUSION_EXIT_ON_FAILURE"] == "true"
    assert env["KUBEDIFFUSION_RESIDENCY"] == "/etc/kubediffusion/residency.json"
    assert env["HF_HOME"] == "/cache/huggingface"
    assert pod_of(world, name)["terminationGracePeriodSeconds"] == 40
    content = world.get("ConfigMap", name)["data"]["residency.json"]
    request = json_format.Parse(content, node_pb2.SetResidencyRequest())
    (model,) = request.models
    assert (request.planner, request.generation) == ("operator", 1)
    assert (model.identity, model.family, model.component) == (name, "sd3", "transformer")
    assert (model.uri, model.revision, model.subfolder) == (
        "hf://org/base",
        "0" * 40,
        "transformer",
    )


def test_every_variable_is_one_of_the_nodes_flags() -> None:
    """A flag that the node does not know would be said to nobody."""
    from kubediffusion.node import flags

    world = world_of()
    world.put("ModelPool", "p", {"replicas": 1, "memoryLimit": "8Gi"})
    name = served(world)
    given = {**env_of(world, name), **env_of(world, "pool-p")}
    ours = {key for key in given if key.startswith("KUBEDIFFUSION_")}
    parsed = vars(flags.parse([], {**given, "KUBEDIFFUSION_NODE_ID": "n"}))
    known = {f"KUBEDIFFUSION_{field.upper()}" for field in parsed}
    assert ours <= known
    assert parsed["memory_limit"] == 8 << 30


def test_readiness_is_the_models_and_liveness_the_processes() -> None:
    world = world_of()
    world.put("ModelPool", "p", {"replicas": 1})
    node = node_of(world, served(world))
    assert node["readinessProbe"]["grpc"] == {"port": 7070}
    assert node["livenessProbe"]["grpc"] == {"port": 7070, "service": "liveness"}
    assert node["startupProbe"]["grpc"] == {"port": 7070, "service": "liveness"}
    # An empty node of a pool waits for its plan, and is no reason to stop a rollout.
    assert node_of(world, "pool-p")["readinessProbe"]["grpc"]["service"] == "liveness"


def test_the_service_gives_every_nodes_address() -> None:
    world = world_of()
    name = served(world)
    spec = world.get("Service", name)["spec"]
    assert spec["clusterIP"] == "None"
    assert spec["publishNotReadyAddresses"] is True
    assert [(port["name"], port["port"]) for port in spec["ports"]] == [
        ("grpc", 7070),
        ("metrics", 9090),
    ]
    assert spec["selector"] == {
        "app.kubernetes.io/component": "model-node",
        "kubediffusion.io/model": name,
    }


def test_evictions_are_bounded_and_never_blocked_by_what_does_not_serve() -> None:
    world = world_of()
    spec = world.get("PodDisruptionBudget", served(world))["spec"]
    assert spec["maxUnavailable"] == 1
    assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def edges(world: World, name: str) -> tuple[list[Any], list[Any]]:
    spec = world.get("NetworkPolicy", name)["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    return spec["ingress"], spec["egress"]


def ports(rules: list[Any]) -> list[list[int]]:
    return [[port["port"] for port in rule["ports"]] for rule in rules]


def test_the_few_edges_that_are_needed() -> None:
    world = world_of(
        gateway={"namespace": "front", "selector": {"app": "gateway"}},
        prometheus={"namespace": "monitoring", "selector": {"app": "prometheus"}},
    )
    ingress, egress = edges(world, served(world))
    assert ports(ingress) == [[7070], [9090]]
    assert ingress[0]["from"][0] == {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "front"}},
        "podSelector": {"matchLabels": {"app": "gateway"}},
    }
    assert {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "model-node"}}} in (
        ingress[0]["from"]
    )
    # DNS, other nodes' tensors, the hub.
    assert ports(egress) == [[53, 53], [7070], [443]]


def test_nothing_but_names_and_nodes_where_nothing_is_downloaded() -> None:
    world = world_of()
    world.workflow("w", source={"uri": "builtin://tiny-sd3"})
    world.settle()
    ingress, egress = edges(world, world.role("w", "vae"))
    assert ports(egress) == [[53, 53], [7070]]
    # Without a Prometheus nobody scrapes.
    assert ports(ingress) == [[7070]]


def test_a_lora_from_the_hub_opens_the_way_to_it() -> None:
    world = world_of()
    source = {"uri": "builtin://tiny-sd3"}
    lora = {"name": "ink", "source": {"uri": "hf://org/ink"}}
    world.workflow("w", source=source, loras=[lora])
    world.settle()
    assert [443] in ports(edges(world, world.role("w", "transformer"))[1])


def test_policies_can_be_left_to_others_and_then_go() -> None:
    world = world_of()
    served(world)
    world.config = world.config.model_copy(
        update={
            "network_policies": world.config.network_policies.model_copy(update={"enabled": False})
        }
    )
    world.cache = type(world.cache)()
    world.settle()
    assert not world.all("NetworkPolicy")


def test_weights_on_a_claim_and_the_token() -> None:
    world = world_of(
        weights={"claimName": "weights"}, hfTokenSecret={"name": "hub", "key": "token"}
    )
    name = served(world)
    volumes = {volume["name"]: volume for volume in pod_of(world, name)["volumes"]}
    assert volumes["cache"]["persistentVolumeClaim"] == {"claimName": "weights"}
    assert volumes["residency"]["configMap"] == {"name": name}
    token = next(e for e in node_of(world, name)["env"] if e["name"] == "HF_TOKEN")
    # A namespace without the Secret serves public models all the same.
    assert token["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token", "optional": True}


@pytest.mark.parametrize(
    ("device", "resources", "limits"),
    [
        ("cpu", None, None),
        ("cuda", None, {"nvidia.com/gpu": "1"}),
        ("cuda", {"limits": {"memory": "8Gi"}}, {"memory": "8Gi", "nvidia.com/gpu": "1"}),
        ("cuda", {"limits": {"amd.com/gpu": "1"}}, {"amd.com/gpu": "1"}),
        ("cuda", {"claims": [{"name": "slice"}]}, None),
    ],
)
def test_a_node_on_an_accelerator_asks_for_one_where_nothing_is_said(
    device: str, resources: Any, limits: Any
) -> None:
    world = world_of(device=device)
    name = served(world, **({"resources": resources} if resources else {}))
    given = node_of(world, name).get("resources", {})
    assert given.get("limits") == limits
    assert given.get("claims") == (resources or {}).get("claims")


def test_a_claim_of_the_configuration_is_a_device_too() -> None:
    container = {"name": "node", "resources": {"claims": [{"name": "gpu"}]}}
    claims = [{"name": "gpu", "resourceClaimTemplateName": "shared"}]
    defaults = {"spec": {"resourceClaims": claims, "containers": [container]}}
    world = world_of(device="cuda", nodeDefaults=defaults)
    name = served(world, resources={"limits": {"memory": "8Gi"}})
    assert node_of(world, name)["resources"] == {
        "limits": {"memory": "8Gi"},
        "claims": [{"name": "gpu"}],
    }
    assert pod_of(world, name)["resourceClaims"] == claims


def test_node_defaults_under_the_models_own_template() -> None:
    defaults = {
        "metadata": {"annotations": {"team": "a", "who": "config"}},
        "spec": {
            "priorityClassName": "low",
            "tolerations": [{"key": "gpu"}],
            "containers": [
                {"name": "node", "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "1"}]}
            ],
        },
    }
    own = {
        "metadata": {"annotations": {"who": "model"}, "labels": {"kubediffusion.io/model": "x"}},
        "spec": {
            "priorityClassName": "high",
            "tolerations": [{"key": "spot"}],
            "containers": [
                {"name": "node", "env": [{"name": "B", "value": "2"}]},
                {"name": "sidecar", "image": "s"},
            ],
        },
    }
    world = world_of(nodeDefaults=defaults)
    name = served(world, podTemplate=own)
    template = world.get("Deployment", name)["spec"]["template"]
    assert template["metadata"]["annotations"] == {"team": "a", "who": "model"}
    # Labels that pods are found by are not anybody's to change.
    assert template["metadata"]["labels"]["kubediffusion.io/model"] == name
    assert template["spec"]["priorityClassName"] == "high"
    assert template["spec"]["tolerations"] == [{"key": "gpu"}, {"key": "spot"}]
    assert [c["name"] for c in template["spec"]["containers"]] == ["node", "sidecar"]
    env = env_of(world, name)
    assert (env["A"], env["B"]) == ("1", "2")
    assert env["KUBEDIFFUSION_DEVICE"] == "cpu"


def test_a_template_that_is_none_is_told_and_stops_nobody_else() -> None:
    world = world_of()
    world.workflow("good", model="good")
    name = served(world)
    before = world.get("Deployment", name)
    world.workflow("w", models={"transformer": {"podTemplate": {"spec": {"containers": "x"}}}})
    world.workflow("late", model="late")
    world.settle()
    told = world.condition("DiffusionModel", name, "Degraded")
    assert (told["status"], told["reason"]) == ("True", "InvalidPodTemplate")
    assert told["message"] == "podTemplate.spec.containers is a list, not a text; correct it"
    # What served goes on serving.
    assert world.get("Deployment", name) == before
    assert world.condition("DiffusionWorkflow", "late", "Ready")["status"] == "True"
    assert world.condition("DiffusionWorkflow", "w", "Degraded")["reason"] == "InvalidPodTemplate"


# ---------------------------------------------------------------- replicas


@pytest.mark.parametrize(
    ("scaling", "asked", "wanted"),
    [
        (None, None, 1),
        (None, 3, 3),
        (None, 0, 0),
        ({"minReplicas": 0, "maxReplicas": 4}, None, 0),
        ({"minReplicas": 2, "maxReplicas": 4}, None, 2),
        ({"minReplicas": 1, "maxReplicas": 4}, 3, 3),
        ({"minReplicas": 1, "maxReplicas": 4}, 9, 4),
        ({"minReplicas": 1, "maxReplicas": 4}, 0, 1),
        ({"mode": "external", "minReplicas": 1, "maxReplicas": 4}, 9, 9),
        ({"mode": "external", "minReplicas": 1, "maxReplicas": 4}, 0, 0),
        ({"mode": "external", "minReplicas": 2, "maxReplicas": 4}, None, 2),
    ],
)
def test_replicas_are_the_models_within_its_bounds(
    scaling: dict[str, Any] | None, asked: int | None, wanted: int
) -> None:
    world = world_of()
    name = served(world, **({"scaling": scaling} if scaling else {}))
    if asked is not None:
        world.set_spec("DiffusionModel", name, replicas=asked)
    world.settle()
    assert world.get("Deployment", name)["spec"]["replicas"] == wanted
    assert world.status("DiffusionModel", name)["desiredReplicas"] == wanted
    # The number has another owner: it is given once, where it is missing, and left alone.
    known = world.get("DiffusionModel", name)["spec"]["replicas"]
    assert known == (wanted if asked is None else asked)


def test_a_number_outside_the_bounds_is_told_once() -> None:
    world = world_of()
    name = served(world, scaling={"minReplicas": 1, "maxReplicas": 2})
    world.set_spec("DiffusionModel", name, replicas=9)
    world.settle()
    world.settle()
    (event,) = [e for e in world.events if e.reason == "ReplicasClamped"]
    assert event.about.name == name
    assert "spec.replicas 9 is outside scaling.maxReplicas: 2 it is" in event.message


def test_a_change_of_replicas_touches_the_deployment_alone() -> None:
    """An autoscaler's word every few seconds must not go to all the nodes."""
    world = world_of()
    name = served(world)
    world.set_spec("DiffusionModel", name, replicas=2)
    made = world.plan()
    assert [(each["kind"], each["metadata"]["name"]) for each in made.apply] == [
        ("Deployment", name)
    ]
    assert not made.residency


def test_zero_replicas_are_ready_to_come_back() -> None:
    world = world_of()
    name = served(world, scaling={"minReplicas": 0, "maxReplicas": 1})
    told = world.condition("DiffusionModel", name, "Ready")
    assert (told["status"], told["reason"]) == ("True", "ScaledToZero")
    assert world.condition("DiffusionWorkflow", "w", "Ready")["status"] == "True"


# ---------------------------------------------------------------- drift


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_deleted_comes_back(kind: str) -> None:
    world = world_of()
    name = served(world)
    before = world.get(kind, name)
    world.delete(kind, name)
    world.settle()
    after = world.get(kind, name)
    for key in ("spec", "data"):
        if kind != "ConfigMap":
            assert after.get(key) == before.get(key)


def test_what_is_changed_is_put_right_and_what_is_added_stays() -> None:
    world = world_of()
    name = served(world)
    deployment = world.get("Deployment", name)
    template = json.loads(json.dumps(deployment["spec"]["template"]))
    template["spec"]["containers"][0]["image"] = "evil"
    template["spec"]["containers"].append({"name": "injected", "image": "mesh"})
    world.edit("Deployment", name, spec={**deployment["spec"], "template": template})
    (wanted,) = world.plan().apply
    node = wanted["spec"]["template"]["spec"]["containers"][0]
    assert node["image"] == "registry.example/node:1"
    template["spec"]["containers"][0]["image"] = "registry.example/node:1"
    world.edit("Deployment", name, spec={**deployment["spec"], "template": template})
    assert not world.plan().writes


def test_what_is_being_deleted_is_left_alone_until_it_is_gone() -> None:
    world = world_of()
    name = served(world)
    gone = world.get("Deployment", name)
    metadata = {**gone["metadata"], "deletionTimestamp": world.time}
    world.edit("Deployment", name, metadata=metadata, spec={**gone["spec"], "replicas": 7})
    assert not world.plan().apply


def test_children_that_nobody_owns_any_more_go() -> None:
    """As after `kubectl delete --cascade=orphan`."""
    world = world_of()
    name = served(world)
    model = world.get("DiffusionModel", name)
    for kind in KINDS:
        metadata = {**world.get(kind, name)["metadata"], "ownerReferences": []}
        world.edit(kind, name, metadata=metadata)
    world.delete("DiffusionWorkflow", "w")
    world.delete("DiffusionModel", name)
    assert model
    refs = {(ref.kind, ref.name) for ref in world.plan().delete}
    assert {(kind, name) for kind in KINDS} <= refs
