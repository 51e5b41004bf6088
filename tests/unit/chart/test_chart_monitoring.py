# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Alerts, dashboards and scraping: what they name is what the processes measure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from kubediffusion.telemetry.reference import GROUPS
from tests.unit.chart.conftest import Render
from tests.unit.chart.rendering import CHART, ROOT, Object, Rendered

ALERTS = yaml.safe_load((CHART / "files/alerts.yaml").read_text())
BOARD = json.loads((CHART / "dashboards/kubediffusion.json").read_text())
# What scraping adds, in the chart's Prometheus and by its monitors.
TARGET_LABELS = {"namespace", "pod", "component", "job", "instance"}
TYPES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def _series() -> dict[str, set[str]]:
    """Names of all series and their labels."""
    found: dict[str, set[str]] = {"up": set()}
    for group in GROUPS.values():
        registry = CollectorRegistry()
        group(registry)
        for collector in set(registry._collector_to_names):
            for metric in collector.describe():
                labels = set(collector._labelnames)
                for suffix in TYPES[metric.type]:
                    extra = {"le"} if suffix == "_bucket" else set[str]()
                    found[metric.name + suffix] = labels | extra
    return found


SERIES = _series()


def _expressions() -> Iterator[tuple[str, str]]:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["query"]


EXPRESSIONS = dict(_expressions())


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_name_series_and_labels_that_exist(name: str) -> None:
    expression = EXPRESSIONS[name]
    selectors = re.findall(r"\b([a-z_]+)(?:\{([^}]*)\}|(?=\[))", expression)
    names = {metric for metric, _ in selectors} | set(
        re.findall(r"kubediffusion_[a-z_]+", expression)
    )
    assert names, "no series at all"
    assert names - SERIES.keys() == set()
    for metric, matchers in selectors:
        used = set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", matchers))
        assert used - SERIES[metric] - TARGET_LABELS == set(), metric
    grouped = {
        word for part in re.findall(r"by \(([^)]*)\)", expression) for word in part.split(", ")
    }
    there = set[str]().union(*(SERIES[metric] for metric in names)) | TARGET_LABELS
    assert grouped - there == set()


@pytest.mark.parametrize("group", [*GROUPS][:2], ids=str.lower)
def test_the_dashboard_leaves_little_out(group: str) -> None:
    """Each family of a node and of a gateway is drawn, but for these."""
    left_out = {
        "kubediffusion_node_checkpoints_total",
        "kubediffusion_node_draining",
        "kubediffusion_node_gateways",
        "kubediffusion_node_memory_limit_bytes",
        "kubediffusion_node_previews_total",
        "kubediffusion_node_residency_generation",
        "kubediffusion_node_tasks_queued",
        "kubediffusion_node_tasks_running",
        "kubediffusion_node_tasks_total",
        "kubediffusion_node_tensor_held_bytes",
        "kubediffusion_node_tensors",
        "kubediffusion_gateway_first_preview_seconds",
        "kubediffusion_gateway_http_request_seconds",
        "kubediffusion_gateway_images_total",
        "kubediffusion_gateway_jobs",
        "kubediffusion_gateway_previews_total",
        "kubediffusion_gateway_shed_task_seconds_total",
    }
    registry = CollectorRegistry()
    GROUPS[group](registry)
    drawn = " ".join(EXPRESSIONS.values())
    families = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for collector in set(registry._collector_to_names)
        for metric in collector.describe()
    }
    assert {name for name in families if name not in drawn} <= left_out


def test_the_committed_dashboard_is_the_generated_one() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/dashboards.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_panels_have_different_ids_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_grafana_finds_the_dashboard(plain: Rendered) -> None:
    board = plain.get("ConfigMap", "dashboards")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(board["data"]["kubediffusion.json"]) == BOARD


def test_rules_are_valid(promtool: str, tmp_path: Path, everything: Rendered) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(everything.get("PrometheusRule", "alerts")["spec"]))
    for file in (CHART / "files/alerts.yaml", rules):
        done = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_when_they_should_and_only_then(promtool: str) -> None:
    """promtool's own unit tests: tests/unit/chart/alerts.yaml."""
    file = Path(__file__).with_name("alerts.yaml")
    done = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_explained() -> None:
    names = {rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]}
    tests = yaml.safe_load(Path(__file__).with_name("alerts.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    page = (ROOT / "docs/kubernetes.md").read_text()
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_the_charts_prometheus_takes_its_configuration(
    promtool: str, tmp_path: Path, either: Rendered
) -> None:
    for name, text in either.get("ConfigMap", "prometheus")["data"].items():
        (tmp_path / name).write_text(text.replace("/etc/prometheus/", f"{tmp_path}/"))
    done = subprocess.run(
        [promtool, "check", "config", tmp_path / "prometheus.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_scraping_finds_all_pods_with_metrics_and_no_others(either: Rendered) -> None:
    config = yaml.safe_load(either.get("ConfigMap", "prometheus")["data"]["prometheus.yaml"])
    (job,) = config["scrape_configs"]
    (discovery,) = job["kubernetes_sd_configs"]
    label = discovery["selectors"][0]["label"]
    components = set(re.findall(r"[a-z-]+", label.partition(" in ")[2]))
    measured = {
        meta["labels"]["app.kubernetes.io/component"]
        for _, meta, spec in either.pods()
        for each in spec["containers"]
        if any(port["name"] == "metrics" for port in each.get("ports", ()))
    }
    assert components == {*measured, "model-node"}
    namespaced = either.config.namespace
    assert discovery.get("namespaces", {}).get("names", [""]) == [namespaced]


def test_monitors_see_what_the_charts_prometheus_sees(render: Render) -> None:
    """Same job and same labels, so that alerts and dashboard do not care which of them it is."""
    for kind, field in (("PodMonitor", "podMetricsEndpoints"), ("ServiceMonitor", "endpoints")):
        rendered = render({"monitors": {"kind": kind}})
        (monitor,) = rendered.of(kind)
        (endpoint,) = monitor["spec"][field]
        targets = {one["targetLabel"]: one for one in endpoint["relabelings"]}
        assert targets["job"]["replacement"] == "kubediffusion"
        assert "component" in targets
        assert endpoint["port"] == "metrics"
        if kind == "PodMonitor":
            seen: list[Object] = [meta for _, meta, _ in rendered.pods()]
        else:
            seen = [each["metadata"] for each in rendered.of("Service") if _measures(each)]
        found = {
            meta["labels"]["app.kubernetes.io/component"]
            for meta in seen
            if _selected(monitor["spec"]["selector"], meta["labels"])
        }
        assert found == {"gateway", "operator"}


def _measures(service: Object) -> bool:
    return any(port["name"] == "metrics" for port in service["spec"]["ports"])


def _selected(selector: Object, labels: dict[str, str]) -> bool:
    return all(labels.get(one["key"]) in one["values"] for one in selector["matchExpressions"])


def test_where_nobody_measures_nothing_is_scaled(render: Render) -> None:
    rendered = render({"prometheus": {"enabled": False}})
    assert rendered.config.scaling.enabled is False
    assert rendered.config.prometheus.url == ""
    assert "promet" not in str(rendered.names("Deployment"))


@pytest.mark.parametrize(
    ("values", "stale"),
    [
        ({}, 30),
        ({"prometheus": {"scrapeIntervalSeconds": 15}}, 45),
        ({"monitors": {"intervalSeconds": 60}}, 30),
        ({"prometheus": {"enabled": False, "url": "http://p:9090"}}, 30),
        (
            {
                "prometheus": {"enabled": False, "url": "http://p:9090"},
                "monitors": {"intervalSeconds": 60},
            },
            180,
        ),
    ],
)
def test_a_number_is_stale_after_three_scrapes(render: Render, values: Object, stale: int) -> None:
    """Of the Prometheus that is read; and not before 30 s."""
    assert render(values).config.prometheus.stale_seconds == stale


def test_a_prometheus_that_is_there_is_used(render: Render) -> None:
    url = "https://prometheus.monitoring:9090"
    rendered = render({"prometheus": {"enabled": False, "url": url, "auth": {"secretName": "p"}}})
    prometheus = rendered.config.prometheus
    assert (prometheus.url, rendered.config.scaling.enabled) == (url, True)
    template = rendered.get("Deployment", "operator")["spec"]["template"]["spec"]
    (operator,) = template["containers"]
    (mount,) = [one for one in operator["volumeMounts"] if one["name"] == "prometheus"]
    for path in (prometheus.bearer_token_file, prometheus.ca_file):
        assert path.startswith(f"{mount['mountPath']}/")
