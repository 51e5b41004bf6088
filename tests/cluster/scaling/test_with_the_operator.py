# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The whole operator as a process: its plan and its autoscaler write the same objects."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.kube import ControlPlane, Kube, Object, condition, is_true
from tests.cluster.operator.fake_kubelet import FakeKubelet
from tests.cluster.operator.running import ACCOUNT, OperatorProcess
from tests.cluster.operator.wanted import models_of, workflow
from tests.cluster.scaling.measured import Exporter, RealPrometheus

PATIENCE = 60.0
ROLES = {"dit": "transformer", "vae": "vae", "clip": "text_encoder"}
# Down as soon as the demand is over, so that nobody waits for five minutes.
AT_ONCE = {"scaleDown": {"stabilizationWindowSeconds": 1}}


def sd3(**roles: dict[str, object]) -> Object:
    """All models at one replica, unless told otherwise by role."""
    models = {role: {"scaling": {"behavior": AT_ONCE, **more}} for role, more in roles.items()}
    return workflow("sd3", models=models)


@dataclass
class Place:
    """A Prometheus that scrapes one gateway of the test's namespace, and names by kind."""

    prometheus: RealPrometheus
    gateway: Exporter
    names: dict[str, str]


NewPlace = Callable[[Object, float], Place]


@pytest.fixture
def new_place(tmp_path: Path, namespace: str) -> Iterator[NewPlace]:
    made: list[Place] = []

    def new(definition: Object, scrape_seconds: float) -> Place:
        identities = models_of(definition)
        names = {kind: identities[role] for kind, role in ROLES.items()}
        gateway = Exporter(())
        gateway.knows(names, names)
        prometheus = RealPrometheus(tmp_path / "prometheus", namespace, scrape_seconds)
        made.append(Place(prometheus, gateway, names))
        prometheus.scrape([gateway.port])
        prometheus.start()
        prometheus.wait_for("up", 1)
        return made[-1]

    yield new
    for place in made:
        place.prometheus.stop()
        place.gateway.close()


def operator_of(
    new_operator: Callable[..., OperatorProcess], place: Place, interval: float, **scaling: object
) -> OperatorProcess:
    operator = new_operator(
        prometheus={"url": place.prometheus.url, "timeoutSeconds": 5.0},
        scaling={"intervalSeconds": interval, **scaling},
    )
    operator.start()
    operator.wait_ready()
    return operator


def wait_replicas(kube: Kube, name: str, replicas: int) -> None:
    """In the model's spec, its Deployment, and its status."""
    kube.wait_for("dmodel", name, lambda m: m["spec"].get("replicas") == replicas, timeout=PATIENCE)
    kube.wait_for("Deployment", name, lambda d: d["spec"]["replicas"] == replicas, timeout=PATIENCE)
    kube.wait_for(
        "dmodel", name, lambda m: m["status"].get("readyReplicas", 0) == replicas, timeout=PATIENCE
    )


def test_up_and_down_with_plan_and_autoscaler_at_peace(
    control_plane: ControlPlane,
    new_operator: Callable[..., OperatorProcess],
    new_place: NewPlace,
    kube: Kube,
    kubelet: FakeKubelet,
) -> None:
    definition = sd3(transformer={"maxReplicas": 3}, vae={"minReplicas": 0})
    place = new_place(definition, 0.5)
    operator = operator_of(new_operator, place, 0.3)
    kube.apply(definition)
    kube.wait_for("dwf", "sd3", is_true("Ready"), timeout=PATIENCE)
    dit, vae = place.names["dit"], place.names["vae"]
    place.gateway.set("dit", queued=6)
    wait_replicas(kube, dit, 3)
    place.gateway.set("dit", queued=0)
    wait_replicas(kube, dit, 1)
    wait_replicas(kube, vae, 0)
    kube.wait_for("dwf", "sd3", is_true("Ready"), timeout=PATIENCE)
    # The operator is killed; its next process says the same, and everything is at rest.
    operator.kill()
    operator.start()
    operator.wait_ready()
    place.gateway.hold(1)
    place.gateway.set("vae", held=1)
    wait_replicas(kube, vae, 1)
    place.gateway.set("vae", running=1)
    place.gateway.hold(0)
    model = kube.wait_for("dmodel", dit, is_true("ScalingActive"), timeout=PATIENCE)
    assert {"Ready", "MetricsAvailable", "ScalingActive"} <= {
        each["type"] for each in model["status"]["conditions"]
    }
    history = [(e["fromReplicas"], e["toReplicas"]) for e in model["status"]["scalingHistory"]]
    assert history == [(3, 1), (1, 3)]
    _assert_rest(control_plane, kube)


def _assert_rest(plane: ControlPlane, kube: Kube, seconds: float = 3.0) -> None:
    """Ten rounds of the autoscaler, in which neither writes; they may have to come to rest."""
    user = f"system:serviceaccount:{kube.namespace}:{ACCOUNT}"
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        mark = plane.now()
        time.sleep(seconds)  # the one thing that can only be waited for: nothing
        if not (written := plane.writes(mark, user=user)):
            return
    shown = [(w["verb"], w["objectRef"].get("name"), w["requestURI"][-60:]) for w in written]
    raise AssertionError(f"they write again and again: {shown}")


def test_from_load_to_replicas_within_two_scrapes_and_a_tick(
    new_operator: Callable[..., OperatorProcess],
    new_place: NewPlace,
    kube: Kube,
    kubelet: FakeKubelet,
) -> None:
    """With the chart's 5 s and 5 s: 15 s."""
    definition = sd3(transformer={"minReplicas": 0, "maxReplicas": 3})
    place = new_place(definition, 5.0)
    operator_of(new_operator, place, 5.0)
    kube.apply(definition)
    dit = place.names["dit"]
    kube.wait_for("dmodel", dit, is_true("MetricsAvailable"), timeout=PATIENCE)
    kube.wait_for("dmodel", dit, lambda m: m["spec"].get("replicas") == 0, timeout=PATIENCE)
    for states, replicas in (({"held": 1}, 1), ({"running": 6}, 3)):
        begin = time.monotonic()
        place.gateway.set("dit", **states)
        kube.wait_for(
            "dmodel", dit, lambda m, n=replicas: m["spec"]["replicas"] == n, timeout=PATIENCE
        )
        assert time.monotonic() - begin < 15.0


def test_a_resource_quota_is_kept_and_a_workflow_comes_whole_or_not(
    new_operator: Callable[..., OperatorProcess],
    new_place: NewPlace,
    kube: Kube,
    kubelet: FakeKubelet,
) -> None:
    gpu = {"limits": {"nvidia.com/gpu": "1", "cpu": "1"}}
    scaling = {"minReplicas": 0, "maxReplicas": 4, "behavior": AT_ONCE}
    roles = {role: {"scaling": scaling, "resources": gpu} for role in ("transformer", "vae")}
    definition = workflow("sd3", models=roles)
    place = new_place(definition, 0.5)
    hard = {"requests.nvidia.com/gpu": "1"}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "gpus"}}
    kube.create({**quota, "spec": {"hard": hard}})
    kube.wait_for("ResourceQuota", "gpus", lambda q: q.get("status", {}).get("used"))
    operator_of(new_operator, place, 0.3)
    kube.apply(definition)
    dit, vae = place.names["dit"], place.names["vae"]
    for name in (dit, vae):
        kube.wait_for("dmodel", name, timeout=PATIENCE)
    with place.gateway.at_once():
        place.gateway.hold(1)
        place.gateway.set("dit", held=8)
        place.gateway.set("vae", held=1)

    def blocked(model: Object) -> bool:
        return condition(model, "ScalingActive").get("reason") == "ActivationBlocked"

    for name in (dit, vae):
        model = kube.wait_for("dmodel", name, blocked, timeout=PATIENCE)
        assert "sd3 needs 2 GPUs to come up" in condition(model, "ScalingActive")["message"]
        assert not model["spec"].get("replicas")
    # More GPUs: the quota is looked at twice a minute.
    kube.patch("ResourceQuota", "gpus", {"spec": {"hard": {"requests.nvidia.com/gpu": "3"}}})
    wait_replicas(kube, dit, 2)
    wait_replicas(kube, vae, 1)
    model = kube.wait_for(
        "dmodel",
        dit,
        lambda m: condition(m, "ScalingActive").get("reason") == "GpuBudgetExhausted",
        timeout=PATIENCE,
    )
    assert model["spec"]["replicas"] == 2
    used = kube.get("ResourceQuota", "gpus")["status"]["used"]["requests.nvidia.com/gpu"]
    assert used == "3"


def test_replicas_that_cannot_start_are_not_added_to(
    new_operator: Callable[..., OperatorProcess],
    new_place: NewPlace,
    kube: Kube,
    kubelet: FakeKubelet,
) -> None:
    from tests.cluster.operator.fake_kubelet import waiting

    kubelet.verdict = waiting("ImagePullBackOff", "no such image")
    definition = sd3(transformer={"maxReplicas": 8})
    place = new_place(definition, 0.5)
    operator_of(new_operator, place, 0.3)
    kube.apply(definition)
    dit = place.names["dit"]
    kube.wait_for(
        "dmodel", dit, lambda m: condition(m, "Degraded").get("status") == "True", timeout=PATIENCE
    )
    place.gateway.set("dit", held=50)
    model = kube.wait_for(
        "dmodel",
        dit,
        lambda m: condition(m, "ScalingActive").get("reason") == "ReplicasCannotStart",
        timeout=PATIENCE,
    )
    assert "ImagePullBackOff" in condition(model, "ScalingActive")["message"]
    assert model["spec"]["replicas"] == 1
