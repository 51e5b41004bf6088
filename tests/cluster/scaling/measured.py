# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus over real exporters, whose numbers the test sets.

An exporter is a gateway's metrics without the gateway: the same group of metrics, the same server.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.core import GaugeMetricFamily

from kubediffusion.telemetry.metrics import GatewayMetrics, Registry, serve_metrics
from tests.cluster.kube import ControlPlane, programs
from tests.cluster.processes import Processes, free_ports

PATIENCE = 60.0
STAGES = {"dit": "denoise", "vae": "decode", "clip": "encode", "shed": "denoise"}


def who_scaled(plane: ControlPlane, since: int, namespace: str, model: str = "dit") -> set[str]:
    """The programs that wrote the model's scale since the mark. (Of a custom resource the API
    server notes no field manager there: spec.replicas has none.)"""
    return {
        write["userAgent"].split("/")[0]
        for write in plane.writes(since)
        if write["objectRef"].get("subresource") == "scale"
        and write["objectRef"].get("namespace") == namespace
        and write["objectRef"].get("name") == model
    }


class Exporter:
    """A gateway that knows of some models (by kind, see STAGES) and one workflow, ``sd3``."""

    def __init__(self, models: Iterable[str] = ("dit",), port: int = 0) -> None:
        self.registry = Registry()
        self.metrics = GatewayMetrics(self.registry)
        self._names: dict[str, str] = {}
        self.knows(models)
        self._server = serve_metrics(self.registry, port=port)
        self.port = self._server.port

    def knows(self, models: Iterable[str], names: dict[str, str] | None = None) -> None:
        """`names` are the models' identities, by kind."""
        self._names = names or {kind: kind for kind in models}
        stages = [(self._names[kind], STAGES[kind]) for kind in self._names]
        self.metrics.known(["sd3"], stages)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What is set inside is scraped together, as of a gateway."""
        with self.registry.at_once:
            yield

    def set(self, kind: str = "dit", **states: float) -> None:
        for state in ("held", "queued", "running"):
            gauge = self.metrics.model_tasks.labels(self._names[kind], STAGES[kind], state)
            gauge.set(states.get(state, 0))

    def hold(self, requests: float) -> None:
        self.metrics.requests_now.labels("sd3", "held").set(requests)

    def shed(self, seconds: float, kind: str = "dit") -> None:
        self.metrics.shed_task_seconds.labels(self._names[kind], STAGES[kind]).inc(seconds)

    def close(self) -> None:
        self._server.close()


class Late:
    """A collector whose samples are `age` seconds old, as an exporter in between may have it."""

    def __init__(self, age: float) -> None:
        self.age = age

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "kubediffusion_gateway_model_tasks", "Old.", labels=("model", "stage", "state")
        )
        for state in ("held", "queued", "running"):
            family.add_metric(("late", "denoise", state), 8.0, timestamp=time.time() - self.age)
        yield family


class RealPrometheus:
    """Scrapes exporters on ports of 127.0.0.1 as the chart's Prometheus scrapes gateways."""

    def __init__(self, folder: Path, namespace: str, scrape_seconds: float = 0.5) -> None:
        self.folder, self.namespace = folder, namespace
        self._scrape = f"{int(scrape_seconds * 1000)}ms"
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self._targets = folder / "targets.json"
        self._processes: Processes | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def scrape(self, ports: Iterable[int], *labels: dict[str, str]) -> None:
        """From now on these. Each of `labels` is said of each over the usual ones (an empty one is
        left out), so that several make several targets of one port."""
        usual = {"namespace": self.namespace, "component": "gateway"}
        groups = []
        for port in ports:
            for more in labels or ({},):
                about = {name: text for name, text in (usual | more).items() if text}
                groups.append({"targets": [f"127.0.0.1:{port}"], "labels": about})
        part = self._targets.with_suffix(".part")
        part.write_text(json.dumps(groups))
        part.replace(self._targets)

    def start(self) -> None:
        """It may be the second time: what it knew is on its disk."""
        job = {
            "job_name": "kubediffusion",
            "file_sd_configs": [{"files": [str(self._targets)], "refresh_interval": "1s"}],
        }
        every = {"scrape_interval": self._scrape, "scrape_timeout": self._scrape}
        config = {"global": every, "scrape_configs": [job]}
        file = self.folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        path = next(p for p in programs("prometheus").split(":") if Path(p, "prometheus").exists())
        if self._processes is None:
            self._processes = Processes(self.folder / "log")
        flags = {
            "config.file": file,
            "storage.tsdb.path": self.folder / "data",
            "web.listen-address": f"127.0.0.1:{self.port}",
        }
        words = [Path(path, "prometheus"), *(f"--{name}={value}" for name, value in flags.items())]
        self._processes.start("prometheus", words)
        self._until(lambda: httpx.get(f"{self.url}/-/ready", trust_env=False).is_success)

    def kill(self) -> None:
        assert self._processes is not None
        self._processes.kill("prometheus")

    def stop(self) -> None:
        if self._processes is not None:
            self._processes.stop()

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        answer = httpx.get(
            f"{self.url}/api/v1/query", params={"query": expression}, trust_env=False
        )
        result: list[dict[str, Any]] = answer.raise_for_status().json()["data"]["result"]
        return [(each["metric"], float(each["value"][1])) for each in result]

    def wait_for(self, expression: str, value: float | None) -> None:
        """Until the sum of what is found is `value`; None: until nothing is found."""

        def fits() -> bool:
            found = [number for _, number in self.query(expression)]
            return not found if value is None else bool(found) and sum(found) == value

        self._until(fits, expression)

    def _until(self, fits: Callable[[], bool], what: str = "Prometheus to start") -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if fits():
                    return
            except httpx.TransportError:
                assert self._processes is not None
                self._processes.check()
            time.sleep(0.02)  # it tells nobody what it has scraped
        raise TimeoutError(f"waited {PATIENCE:g} s for {what}")
