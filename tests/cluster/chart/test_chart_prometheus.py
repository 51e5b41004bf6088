# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The chart's Prometheus, with its configuration and its account, over pods that really measure.

No pod runs here: the test gives pods addresses of this machine, and serves their metrics there.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry

from kubediffusion.telemetry.metrics import (
    GatewayMetrics,
    MetricsServer,
    NodeMetrics,
    OperatorMetrics,
    serve_metrics,
)
from kubediffusion_operator.autoscaler.reading import queries
from kubediffusion_operator.config import OperatorConfig
from kubediffusion_operator.planning.names import model_labels
from kubediffusion_operator.planning.pods import pod_template
from tests.cluster.chart.conftest import Release
from tests.cluster.kube import ControlPlane, Kube, Object
from tests.cluster.processes import Processes, free_ports
from tests.unit.chart.conftest import program
from tests.unit.chart.rendering import CHART

PORT = 9090
PATIENCE = 60.0
BOARD = json.loads((CHART / "dashboards/kubediffusion.json").read_text())


class Busy:
    """Metrics of one process that change all the time: of each family a series or two."""

    OUTCOMES = ("succeeded", "kept")  # of tasks, of tokens

    def __init__(self, group: Callable[[CollectorRegistry], Any]) -> None:
        self.registry = CollectorRegistry()
        self.metrics = group(self.registry)
        self._words = {"model": "tiny-dit", "workflow": "tiny", "stage": "denoise"}
        self._words |= {"state": "ready", "kind": "Pod"}

    def work(self) -> None:
        for metric in vars(self.metrics).values():
            names = getattr(metric, "_labelnames", None)
            if names is None:
                continue
            for outcome in self.OUTCOMES if "outcome" in names else ("",):
                said = self._words | {"outcome": outcome}
                words = [said.get(name, "some") for name in names]
                child = metric.labels(*words) if words else metric
                if hasattr(child, "observe"):
                    child.observe(0.3)
                elif hasattr(child, "set"):
                    child.set(1)
                else:
                    child.inc()


@dataclass
class Pods:
    """Pods with addresses of this machine, whose metrics are served until the test ends."""

    kube: Kube
    served: list[MetricsServer] = field(default_factory=list)
    busy: list[Busy] = field(default_factory=list)

    def runs(self, pod: Object, group: Callable[[CollectorRegistry], Any]) -> str:
        """`pod` is there and measures. Returns its address."""
        busy = Busy(group)
        busy.work()
        # All of 127.0.0.0/8 is this machine.
        address = ".".join(["127", *(str(random.randint(1, 250)) for _ in range(3))])
        self.served.append(serve_metrics(busy.registry, address, PORT))
        self.busy.append(busy)
        status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}
        name = pod["metadata"]["name"]
        self.kube.patch("Pod", name, {"status": status}, subresource="status")
        return address

    def close(self) -> None:
        for server in self.served:
            server.close()


@pytest.fixture
def pods(admin: Kube, restricted: str) -> Iterator[Pods]:
    pods = Pods(admin.within(restricted))
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.2):
            for each in pods.busy:
                each.work()

    worker = threading.Thread(target=work)
    worker.start()
    yield pods
    stop.set()
    worker.join()
    pods.close()


@pytest.fixture
def prometheus(release: Release, control_plane: ControlPlane, tmp_path: Path) -> Iterator[str]:
    """The address of a real Prometheus as the chart runs it, but outside of the cluster."""
    release.install({"prometheus": {"scrapeIntervalSeconds": 1}})
    objects = {(each["kind"], each["metadata"]["name"]): each for each in release.objects()}
    data = objects["ConfigMap", "kd-kubediffusion-prometheus"]["data"]
    config = yaml.safe_load(data["prometheus.yaml"])
    token = control_plane.token_for("kd-kubediffusion-prometheus", release.namespace)
    (tmp_path / "token").write_text(token)
    # A pod finds these in its file system.
    inside = {
        "api_server": control_plane.url,
        "authorization": {"credentials_file": str(tmp_path / "token")},
        "tls_config": {"ca_file": str(control_plane.pki / "ca.crt")},
    }
    config["scrape_configs"][0]["kubernetes_sd_configs"][0] |= inside
    config["rule_files"] = [str(tmp_path / "alerts.yaml")]
    (tmp_path / "alerts.yaml").write_text(data["alerts.yaml"])
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    flags = {
        "config.file": tmp_path / "prometheus.yaml",
        "storage.tsdb.path": tmp_path / "data",
        "web.listen-address": f"127.0.0.1:{port}",
    }
    processes = Processes(tmp_path / "log")
    command = [program("prometheus"), *(f"--{name}={value}" for name, value in flags.items())]
    processes.start("prometheus", command)
    yield f"http://127.0.0.1:{port}"
    processes.stop()


def query(url: str, expression: str) -> list[dict[str, str]]:
    """The labels of each sample that is a number."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expression}, trust_env=False)
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:  # it is starting
        return []
    assert answer.is_success, f"{expression}: {answer.text}"
    return [
        each["metric"]
        for each in answer.json()["data"]["result"]
        if each["value"][1] not in ("NaN", "+Inf")
    ]


def until(fits: Callable[[], Any], what: str) -> Any:
    """Prometheus tells nobody what it has scraped."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if found := fits():
                return found
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"waited {PATIENCE:g} s for {what}")


def made(kube: Kube, component: str) -> list[Object]:
    """The pods that the controllers made of a Deployment of the chart's."""
    label = f"app.kubernetes.io/component={component}"
    return kube.wait_all("Pod", lambda pods: len(pods) >= 1, selector=label)


def model_node(kube: Kube) -> Object:
    """A pod as the operator would have it made."""
    spec = {"resources": {}}
    template = pod_template(
        OperatorConfig(image="node"), model_labels("tiny-dit"), spec=spec, drain_seconds=1
    )
    template["metadata"]["name"] = "tiny-dit-0"
    return kube.create({"apiVersion": "v1", "kind": "Pod", **template})


def stranger(kube: Kube, name: str, labels: dict[str, str]) -> Object:
    """A pod of somebody else's, with a port of the same name."""
    ports = [{"name": "metrics", "containerPort": PORT}]
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {"name": "c", "image": "i", "ports": ports, "securityContext": security}
    pod_security = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    return kube.create(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels},
            "spec": {"containers": [container], "securityContext": pod_security},
        }
    )


def test_it_scrapes_our_pods_alone_and_answers_all_that_is_asked(
    pods: Pods, prometheus: str, release: Release
) -> None:
    kube = pods.kube
    gateways = made(kube, "gateway")
    ours = {
        pods.runs(gateways[0], GatewayMetrics): (gateways[0], "gateway"),
        pods.runs(made(kube, "operator")[0], OperatorMetrics): ({}, "operator"),
        pods.runs(model_node(kube), NodeMetrics): ({}, "model-node"),
    }
    pods.runs(stranger(kube, "other", {"app": "other"}), GatewayMetrics)
    named_alike = {"app.kubernetes.io/component": "gateway", "app.kubernetes.io/part-of": "shop"}
    pods.runs(stranger(kube, "alike", named_alike), GatewayMetrics)

    def all_up() -> bool:
        return len(query(prometheus, 'up{job="kubediffusion"} == 1')) == len(ours)

    until(all_up, "three pods to be scraped")
    targets = query(prometheus, "up")
    assert {each["instance"].partition(":")[0]: each["component"] for each in targets} == {
        address: component for address, (_, component) in ours.items()
    }
    assert {each["namespace"] for each in targets} == {release.namespace}
    assert gateways[0]["metadata"]["name"] in {each["pod"] for each in targets}

    # What the autoscaler asks.
    for name, expression in queries(stale_seconds=30).items():
        until(lambda each=expression: query(prometheus, each), f"the autoscaler's {name}")
    # What the dashboard asks.
    for title, expression in panels(release.namespace):
        until(lambda each=expression: query(prometheus, each), f"panel {title}: {expression}")
    # And the alerts are evaluated.
    groups = httpx.get(f"{prometheus}/api/v1/rules", trust_env=False).json()["data"]["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
    assert len(groups) == 3


def panels(namespace: str) -> Iterator[tuple[str, str]]:
    """As Grafana would ask: its variables filled in."""
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"].replace("$__rate_interval", "10s")
            text = text.replace("$namespace", namespace).replace("$workflow", ".*")
            assert not re.search(r"\$", text), text
            yield panel["title"], text
