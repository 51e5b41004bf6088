# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The replicas in the hands of a HorizontalPodAutoscaler, of KEDA, or of kubectl."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.kube import ROOT, ControlPlane, Kube, Object, condition
from tests.cluster.operator.fake_kubelet import FakeKubelet
from tests.cluster.operator.running import OperatorProcess
from tests.cluster.operator.wanted import models_of
from tests.cluster.processes import Processes
from tests.cluster.scaling.external_metrics import ExternalMetrics
from tests.cluster.scaling.measured import Exporter, RealPrometheus, who_scaled

PATIENCE = 60.0
EXAMPLES = ROOT / "examples"
KINDS = ("hpa", "keda")


def example(name: str) -> Any:
    return yaml.safe_load((EXAMPLES / name).read_text())


WORKFLOW = example("external-scaling.yaml")
MODEL = models_of(WORKFLOW)["transformer"]
RULE = example("autoscaling/prometheus-adapter.yaml")["rules"]["external"][0]


@pytest.fixture
def gateway() -> Iterator[Exporter]:
    gateway = Exporter(())
    gateway.knows((), {"dit": MODEL})
    yield gateway
    gateway.close()


@pytest.fixture
def prometheus(tmp_path: Path, namespace: str, gateway: Exporter) -> Iterator[RealPrometheus]:
    prometheus = RealPrometheus(tmp_path / "prometheus", namespace)
    prometheus.scrape([gateway.port])
    prometheus.start()
    prometheus.wait_for("up", 1)
    yield prometheus
    prometheus.stop()


@pytest.fixture
def hpa_controller(control_plane: ControlPlane, tmp_path: Path) -> Iterator[None]:
    """Kubernetes' own, beside the controllers of the session."""
    flags = control_plane._controller_flags() | {
        "controllers": "horizontal-pod-autoscaler-controller",
        "horizontal-pod-autoscaler-sync-period": "1s",
        "horizontal-pod-autoscaler-downscale-stabilization": "2s",
    }
    words = [control_plane.program("kube-controller-manager")]
    processes = Processes(tmp_path / "controller")
    processes.start("hpa", [*words, *(f"--{name}={value}" for name, value in flags.items())])
    yield
    processes.check()
    processes.stop()


@pytest.fixture
def external_metrics(
    control_plane: ControlPlane, admin: Kube, prometheus: RealPrometheus
) -> Iterator[None]:
    metrics = ExternalMetrics(control_plane, admin, prometheus, RULE)
    yield
    metrics.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_examples_mean_the_model_of_the_example_workflow(kind: str) -> None:
    target = example(f"autoscaling/{kind}.yaml")["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": "kubediffusion.io/v1alpha1",
        "kind": "DiffusionModel",
        "name": MODEL,
    }
    assert WORKFLOW["spec"]["models"]["transformer"]["scaling"]["mode"] == "external"


def test_the_api_server_takes_the_hpa(control_plane: ControlPlane, namespace: str) -> None:
    file = EXAMPLES / "autoscaling/hpa.yaml"
    words = ("apply", "--dry-run=server", "-n", namespace, "-f", str(file))
    assert "created (server dry run)" in control_plane.kubectl(*words)


def _queries(namespace: str) -> dict[str, str]:
    labels = f'namespace="{namespace}",model="{MODEL}"'
    (trigger,) = example("autoscaling/keda.yaml")["spec"]["triggers"]
    assert trigger["metadata"]["threshold"] == "2"
    return {
        "hpa": RULE["metricsQuery"].replace("<<.LabelMatchers>>", labels),
        "keda": trigger["metadata"]["query"].replace('"default"', f'"{namespace}"'),
    }


def test_both_read_the_demand_and_nothing_where_nobody_says_it(
    prometheus: RealPrometheus, gateway: Exporter, namespace: str
) -> None:
    queries = _queries(namespace)
    gateway.set("dit", held=1, queued=2, running=4)
    for query in queries.values():
        prometheus.wait_for(query, 7)
    shed = "kubediffusion_gateway_shed_task_seconds_total"
    prometheus.wait_for(f"min(count_over_time({shed}[1m])) > bool 2", 1)
    gateway.shed(600)
    for query in queries.values():
        prometheus.wait_for(f"({query}) > bool 7.5", 1)
    for query in _queries("elsewhere").values():
        assert prometheus.query(query) == []


def test_a_real_hpa_scales_a_model_and_the_operator_follows(
    control_plane: ControlPlane,
    new_operator: Callable[..., OperatorProcess],
    prometheus: RealPrometheus,
    gateway: Exporter,
    hpa_controller: None,
    external_metrics: None,
    kube: Kube,
    kubelet: FakeKubelet,
) -> None:
    operator = new_operator(prometheus={"url": prometheus.url}, scaling={"intervalSeconds": 0.5})
    operator.start()
    operator.wait_ready()
    kube.apply(WORKFLOW)
    left = kube.wait_for("dmodel", MODEL, _is_external, timeout=PATIENCE)
    assert left["spec"]["replicas"] == 1, "an HPA needs a number to begin with"
    mark = control_plane.now()
    hpa = example("autoscaling/hpa.yaml")
    hpa["spec"]["behavior"] = {"scaleDown": {"stabilizationWindowSeconds": 1}}
    kube.apply(hpa)
    gateway.set("dit", queued=5)
    _wait_served(kube, 3)
    gateway.set("dit", queued=100)  # more than its maximum
    _wait_served(kube, 4)
    # By hand beyond every bound: with mode external nothing is clamped by us, and it is the HPA
    # that brings the number back.
    kube.patch("DiffusionModel", MODEL, {"spec": {"replicas": 6}}, subresource="scale")
    gateway.set("dit", queued=0)
    _wait_served(kube, 1)
    scalers = who_scaled(control_plane, mark, kube.namespace, MODEL)
    assert scalers == {"kube-controller-manager", "tests"}
    # What does not answer is not zero, for the HPA neither.
    gateway.set("dit", queued=5)
    _wait_served(kube, 3)
    prometheus.scrape([])
    prometheus.wait_for("up", None)
    kube.wait_for(
        "HorizontalPodAutoscaler",
        hpa["metadata"]["name"],
        lambda h: condition(h, "ScalingActive").get("reason") == "FailedGetExternalMetric",
        timeout=PATIENCE,
    )
    assert kube.get("DiffusionModel", MODEL)["spec"]["replicas"] == 3


def _is_external(model: Object) -> bool:
    told = condition(model, "ScalingActive").get("reason") == "External"
    return told and model["spec"].get("replicas") is not None


def _wait_served(kube: Kube, replicas: int) -> None:
    """In the model's scale, and in what serves it."""
    kube.wait_for(
        "DiffusionModel", MODEL, lambda m: m["spec"]["replicas"] == replicas, timeout=PATIENCE
    )
    kube.wait_for(
        "Deployment", MODEL, lambda d: d["spec"]["replicas"] == replicas, timeout=PATIENCE
    )
    kube.wait_for(
        "DiffusionModel",
        MODEL,
        lambda m: m["status"].get("readyReplicas", 0) == replicas,
        timeout=PATIENCE,
    )
