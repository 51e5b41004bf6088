# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What planning writes, written to a real API server: taken as it is, and settled at once."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from kubediffusion.workflow import PipelineIndex
from kubediffusion_operator.config import OperatorConfig, load_config
from kubediffusion_operator.planning import Observed, Plan, PlanCache, plan
from kubediffusion_operator.planning.types import (
    MANAGER,
    Object,
    Resolution,
)
from tests.cluster.kube import ControlPlane, Kube

KINDS = {
    "workflows": "DiffusionWorkflow",
    "models": "DiffusionModel",
    "pools": "ModelPool",
    "revisions": "apps/v1/ControllerRevision",
    "deployments": "apps/v1/Deployment",
    "services": "Service",
    "pdbs": "policy/v1/PodDisruptionBudget",
    "networkpolicies": "networking.k8s.io/v1/NetworkPolicy",
    "configmaps": "ConfigMap",
    "pods": "Pod",
}
INDEX = PipelineIndex(
    {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
    },
    "0" * 40,
)
# All that can be configured is in it, in spellings that the API server changes.
CONFIG = """
image: registry.example/node:1
device: cuda
nodeDefaults:
  metadata: {annotations: {team: a}}
  spec:
    nodeSelector: {pool: gpu}
    tolerations: [{key: nvidia.com/gpu, operator: Exists}]
    hostNetwork: false
    containers:
      - {name: node, env: [{name: EMPTY, value: ""}], resources: {requests: {cpu: "0.50"}}}
weights: {claimName: weights, readOnly: true}
hfTokenSecret: {name: hub}
gateway: {namespace: front, selector: {app: gateway}, endpoint: "http://gateway.{namespace}:8080"}
prometheus: {url: "http://prometheus:9090"}
networkPolicies:
  extraEgress: [{to: [{ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: 3128, protocol: TCP}]}]
"""
SPEC: dict[str, Any] = {
    "pipeline": {"preset": "StableDiffusion3", "source": {"uri": "hf://org/name"}},
    "loras": [{"name": "ink", "source": {"uri": "hf://org/ink"}, "scale": "0.5"}],
    "models": {
        "transformer": {
            "resources": {"requests": {"memory": "2048Mi"}, "limits": {"memory": "4096Mi"}},
            "scaling": {"minReplicas": 0, "maxReplicas": 3, "targetPerReplica": "2.0"},
            "podTemplate": {
                "spec": {
                    "priorityClassName": None,
                    "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1024Mi"}}],
                }
            },
        },
        "vae": {"scaling": {"mode": "external", "minReplicas": 2, "maxReplicas": 2}},
        "text_encoder": {"placement": {"pool": "small"}},
    },
    "inputs": {"guidance": {"default": 4.0, "maximum": 7.5}},
}


class Driver:
    """The least that carries plans out."""

    def __init__(self, kube: Kube, config: OperatorConfig) -> None:
        self.kube, self.config = kube, config
        self.cache = PlanCache()
        self.resolutions: dict[tuple[str, int], Resolution] = {}
        self.applied: dict[tuple[str, str], Object] = {}

    def observed(self) -> Observed:
        found: dict[str, dict[str, Object]] = {}
        for field, kind in KINDS.items():
            ours = (
                ""
                if field in ("workflows", "models", "pools")
                else ("app.kubernetes.io/managed-by=kubediffusion")
            )
            name = kind.rpartition("/")[2]
            listed = self.kube.list(kind, selector=ours)
            found[field] = {
                each["metadata"]["name"]: {"apiVersion": _version(kind), "kind": name, **each}
                for each in listed
            }
        now = datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")
        return Observed(
            namespace=self.kube.namespace,
            now=now,
            config=self.config,
            resolutions=dict(self.resolutions),
            **found,
        )

    def plan(self) -> Plan:
        return plan(self.observed(), self.cache)

    def carry_out(self, made: Plan) -> None:
        for wanted in made.apply:
            self.kube.apply(copy.deepcopy(wanted), manager=MANAGER)
            kind = f"{wanted['apiVersion']}/{wanted['kind']}"
            self.applied[kind, wanted["metadata"]["name"]] = wanted
        for ref in made.delete:
            kind = f"{ref.api_version}/{ref.kind}"
            self.kube.delete(kind, ref.name, missing_ok=True)
        for each in made.scale:
            patch = {"spec": {"replicas": each.replicas}}
            self.kube.patch("DiffusionModel", each.name, patch, subresource="scale")
        for (kind, name), status in made.status.items():
            body = {
                "apiVersion": "kubediffusion.io/v1alpha1",
                "kind": kind,
                "metadata": {"name": name},
                "status": status,
            }
            self.kube.apply(body, manager=MANAGER, subresource="status")
        for workflow in made.resolve:
            meta = workflow["metadata"]
            self.resolutions[meta["uid"], meta["generation"]] = Resolution(INDEX)

    def settle(self) -> None:
        """Until three plans in a row find nothing to do: controllers write statuses meanwhile."""
        still = 0
        for _ in range(100):
            made = self.plan()
            still = 0 if made.writes or made.resolve else still + 1
            if still == 3:
                return
            self.carry_out(made)
        pytest.fail(f"does not settle: {[w['kind'] for w in made.apply]} {list(made.status)}")


def _version(kind: str) -> str:
    version = kind.rpartition("/")[0]
    if version:
        return version
    ours = kind in ("DiffusionWorkflow", "DiffusionModel", "ModelPool")
    return "kubediffusion.io/v1alpha1" if ours else "v1"


def workflow(**changes: Any) -> Object:
    return {
        "apiVersion": "kubediffusion.io/v1alpha1",
        "kind": "DiffusionWorkflow",
        "metadata": {"name": "w"},
        "spec": {**SPEC, **changes},
    }


@pytest.fixture
def driver(kube: Kube, crds: list[str]) -> Driver:
    assert crds
    kube.patch(
        "Namespace",
        kube.namespace,
        {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}},
    )
    kube.create(
        {
            "apiVersion": "kubediffusion.io/v1alpha1",
            "kind": "ModelPool",
            "metadata": {"name": "small"},
            "spec": {"replicas": 1, "memoryLimit": "8Gi"},
        }
    )
    kube.create(workflow())
    return Driver(kube, load_config(CONFIG))


def transformer(driver: Driver) -> str:
    models = driver.kube.get("DiffusionWorkflow", "w")["status"]["models"]
    return next(each["model"] for each in models if each["role"] == "transformer")


def test_all_is_taken_and_then_nothing_is_written(
    driver: Driver, control_plane: ControlPlane
) -> None:
    driver.settle()
    mark = control_plane.now()
    driver.cache = PlanCache()  # a new operator
    assert not driver.plan().writes
    assert not control_plane.writes(mark, agent="tests")
    status = driver.kube.get("DiffusionWorkflow", "w")["status"]
    assert len(status["models"]) == 5
    assert (
        status["revision"] == driver.kube.list("apps/v1/ControllerRevision")[0]["metadata"]["name"]
    )


def test_pods_are_let_in_at_the_restricted_level(driver: Driver) -> None:
    """The ReplicaSets' pods are made: none is refused by Pod Security."""
    driver.settle()
    name = transformer(driver)
    driver.kube.patch("DiffusionModel", name, {"spec": {"replicas": 1}}, subresource="scale")
    driver.settle()
    pods = driver.kube.wait_all(
        "Pod", lambda found: len(found) == 6, selector="app.kubernetes.io/component=model-node"
    )
    owners = {each["metadata"]["labels"].get("kubediffusion.io/model", "pool") for each in pods}
    # vae twice, the transformer, two encoders, and the pool's node.
    assert name in owners
    assert len(owners) == 5


def test_a_write_of_the_same_changes_nothing(driver: Driver) -> None:
    """Server-side apply of what is there already leaves even the version alone."""
    driver.settle()
    assert len(driver.applied) > 25
    for (kind, name), wanted in driver.applied.items():
        before = driver.kube.get(kind, name)["metadata"]
        after = driver.kube.apply(copy.deepcopy(wanted), manager=MANAGER)["metadata"]
        assert after["resourceVersion"] == before["resourceVersion"], (kind, name)


@pytest.mark.parametrize("field", ["deployments", "services", "pdbs", "networkpolicies"])
def test_drift_is_found_and_put_right(driver: Driver, field: str) -> None:
    driver.settle()
    kind = KINDS[field]
    name = transformer(driver)
    before = driver.kube.get(kind, name)
    changed = {
        "deployments": {"spec": {"replicas": 7, "template": {"spec": {"nodeSelector": None}}}},
        "services": {"spec": {"publishNotReadyAddresses": False}},
        "pdbs": {"spec": {"maxUnavailable": 2}},
        "networkpolicies": {"spec": {"ingress": None}},
    }[field]
    driver.kube.patch(kind, name, changed)
    assert [each["kind"] for each in driver.plan().apply] == [kind.rpartition("/")[2]]
    driver.settle()
    assert driver.kube.get(kind, name)["spec"] == before["spec"]


EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "another strategy": ({"strategy": "Replace"}, "Recreate"),
    "no override any more": ({"models": {}}, "RollingUpdate"),
}


@pytest.mark.parametrize(("changes", "strategy"), EDITS.values(), ids=EDITS.keys())
def test_an_edit_reaches_its_deployment(
    driver: Driver, changes: dict[str, Any], strategy: str
) -> None:
    driver.settle()
    name = transformer(driver)
    known = driver.kube.get("DiffusionWorkflow", "w")
    driver.kube.replace({**known, "spec": {**SPEC, **changes}})
    driver.settle()
    spec = driver.kube.get("apps/v1/Deployment", name)["spec"]
    assert spec["strategy"]["type"] == strategy
    volumes = {each["name"]: each for each in spec["template"]["spec"]["volumes"]}
    # What is not said any more is taken out.
    assert ("sizeLimit" in volumes["tmp"]["emptyDir"]) is bool("models" not in changes)
    driver.kube.replace({**driver.kube.get("DiffusionWorkflow", "w"), "spec": SPEC})
    driver.settle()
    numbers = [each["revision"] for each in driver.kube.list("apps/v1/ControllerRevision")]
    # Back to the first spec: its revision is the newest again, under a new number.
    assert sorted(numbers) == [2, 3]


def test_the_users_example_names_the_same_models_as_the_cluster(driver: Driver) -> None:
    """A hand-made DiffusionModel of the examples has the right name."""
    from pathlib import Path

    file = Path(__file__).parents[3] / "examples/diffusion-model.yaml"
    model = yaml.safe_load(file.read_text())
    driver.kube.create(model)
    driver.settle()
    name = model["metadata"]["name"]
    assert driver.kube.get("DiffusionModel", name)["status"]["identity"] == name
    assert driver.kube.find("apps/v1/Deployment", name)


def test_the_first_number_of_replicas_is_the_scalers(driver: Driver) -> None:
    """The operator's own field manager must not own what autoscalers set."""
    driver.settle()
    vae = next(
        each for each in driver.kube.list("DiffusionModel") if each["spec"]["component"] == "vae"
    )
    assert vae["spec"]["replicas"] == 2
    owners = {
        each["manager"]
        for each in vae["metadata"]["managedFields"]
        if "f:replicas" in each.get("fieldsV1", {}).get("f:spec", {})
    }
    assert MANAGER not in owners
