# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import urllib.request
from pathlib import Path
from threading import Thread

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kubediffusion.errors import Unavailable
from kubediffusion.telemetry import reference
from kubediffusion.telemetry.metrics import (
    GatewayMetrics,
    NodeMetrics,
    OperatorMetrics,
    Registry,
    SupervisorMetrics,
    serve_metrics,
)

ROOT = Path(__file__).parents[3]
GROUPS = [NodeMetrics, GatewayMetrics, OperatorMetrics, SupervisorMetrics]
BOUNDED_LABELS = {
    *("model", "stage", "state", "reason", "outcome", "workflow", "route", "code"),
    *("kind", "verb"),
}
UNITS = ("_seconds", "_bytes", "_total", "_size")


def text(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def test_two_nodes_live_in_one_process_each_with_its_own_numbers() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    NodeMetrics(first).tasks_queued.labels("m", "denoise").set(9)
    NodeMetrics(second).tasks_queued.labels("m", "denoise").set(1)
    line = 'kubediffusion_node_tasks_queued{model="m",stage="denoise"}'
    assert f"{line} 9.0" in text(first)
    assert f"{line} 1.0" in text(second)


def test_all_groups_fit_into_one_registry() -> None:
    registry = CollectorRegistry()
    for group in GROUPS:
        group(registry)
    text(registry)


def test_a_known_model_reports_zero_before_anything_happened() -> None:
    registry = CollectorRegistry()
    NodeMetrics(registry).known("m", ["denoise"])
    GatewayMetrics(registry).known(
        workflows=(w for w in ["sd3"]), models=(m for m in [("m", "encode"), ("n", "decode")])
    )
    assert 'kubediffusion_node_tasks_queued{model="m",stage="denoise"} 0.0' in text(registry)
    for state in ("held", "queued", "running"):
        for labels in (
            f'model="m",stage="encode",state="{state}"',
            f'stage="decode",state="{state}"',
        ):
            assert re.search(rf"gateway_model_tasks{{.*{labels}}} 0\.0", text(registry))
        assert f'requests_now{{state="{state}",workflow="sd3"}} 0.0' in text(registry)


def test_a_forgotten_model_leaves_no_gauge_and_keeps_its_counters() -> None:
    registry = CollectorRegistry()
    node, gateway = NodeMetrics(registry), GatewayMetrics(registry)
    node.known("m", ["denoise"])
    node.set_model_state("m", "ready")
    node.model_resident_bytes.labels("m").set(5)
    node.denoise_steps.labels("m").inc()
    gateway.known(["w"], [("m", "denoise")])
    for _ in range(2):
        node.forget("m", ["denoise"])
        gateway.forget(["w"], [("m", "denoise")])
    left = [line for line in text(registry).splitlines() if 'model="m"' in line or '"w"' in line]
    assert {line.split("{")[0] for line in left} == {
        "kubediffusion_node_denoise_steps_total",
        "kubediffusion_node_denoise_steps_created",
        "kubediffusion_gateway_shed_task_seconds_total",
        "kubediffusion_gateway_shed_task_seconds_created",
    }


def test_a_scrape_sees_what_was_set_at_once_whole_or_not_at_all() -> None:
    registry = Registry()
    gateway = GatewayMetrics(registry)
    gateway.known(["w"], [("dit", "denoise"), ("vae", "decode")])
    scraped: list[str] = []
    scrape = Thread(target=lambda: scraped.append(text(registry)))
    with registry.at_once:
        gateway.model_tasks.labels("dit", "denoise", "held").set(1)
        scrape.start()
        scrape.join(0.2)
        gateway.model_tasks.labels("vae", "decode", "held").set(1)
    scrape.join()
    assert len(re.findall(r'model_tasks{.*state="held"} 1\.0', scraped[0])) == 2


def test_a_model_is_in_one_state_at_a_time() -> None:
    registry = CollectorRegistry()
    node = NodeMetrics(registry)
    node.set_model_state("m", "loading")
    node.set_model_state("m", "ready")
    ones = re.findall(r'model_state{model="m",state="(\w+)"} 1\.0', text(registry))
    assert ones == ["ready"]


@pytest.mark.parametrize("group", GROUPS)
def test_names_and_labels_follow_the_conventions(group: type) -> None:
    for name, kind, labels, documentation in reference.rows(group):
        assert re.fullmatch(r"kubediffusion_(node|gateway|operator|supervisor)_[a-z_]+", name)
        assert (kind == "counter") == name.endswith("_total")
        if kind == "histogram":
            assert name.endswith(UNITS)
        assert set(re.findall(r"\w+", labels)) <= BOUNDED_LABELS
        assert documentation.endswith(".")


def test_the_documentation_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "metrics.md").read_text()
    assert written == reference.reference(), (
        "run: python -m kubediffusion.telemetry.reference > docs/metrics.md"
    )


def test_metrics_are_served_on_a_free_port_until_closed() -> None:
    registry = CollectorRegistry()
    SupervisorMetrics(registry).nodes.set(3)
    server = serve_metrics(registry)
    url = f"http://127.0.0.1:{server.port}/metrics"
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert b"kubediffusion_supervisor_nodes 3.0" in answer.read()
    server.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=60)


def test_a_metrics_port_in_use_is_said_so() -> None:
    server = serve_metrics(CollectorRegistry())
    try:
        with pytest.raises(Unavailable, match=f"{server.port}.*another port") as info:
            serve_metrics(CollectorRegistry(), port=server.port)
        assert info.value.reason == "PortInUse"
    finally:
        server.close()
