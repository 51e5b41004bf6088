# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The autoscaler between a real Prometheus and the session's real API server."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from kubediffusion.cluster.api import Api
from kubediffusion.telemetry.metrics import OperatorMetrics
from kubediffusion_operator.autoscaler import Autoscaler, Prometheus
from kubediffusion_operator.cluster import Cluster
from kubediffusion_operator.config import OperatorConfig
from kubediffusion_operator.config import Prometheus as ConfiguredPrometheus
from kubediffusion_operator.planning.types import SCALER
from kubediffusion_operator.writing import Writer
from tests.cluster.kube import AsyncKube, ControlPlane, Kube, Object, condition
from tests.cluster.operator.conftest import kubelet, new_operator, node
from tests.cluster.scaling.measured import STAGES, Exporter, RealPrometheus

__all__ = ["kubelet", "new_operator", "node"]

NewPrometheus = Callable[..., RealPrometheus]
SPEC = {"family": "sd3", "component": "transformer", "source": {"uri": "builtin://tiny-sd3"}}


class Scaled:
    """The autoscaler's rounds, one by one, by a clock that the test can turn on."""

    def __init__(self, api: Api, config: OperatorConfig) -> None:
        self._api, self._config = api, config
        self._changed = asyncio.Event()
        self._cluster = Cluster(lambda _: self._changed.set(), now=time.monotonic)
        self._watches: list[asyncio.Task[None]] = []
        self._ahead = 0.0
        self._prometheus: list[Prometheus] = []
        self.restart()

    async def start(self) -> None:
        found = self._cluster.watch(self._api, self._config.namespace).values()
        self._watches = [asyncio.create_task(watch.run()) for watch in found]
        await asyncio.wait_for(self._cluster.wait_synced(), 60)

    def restart(self) -> None:
        """A fresh process, as far as its memory goes."""
        metrics = OperatorMetrics(CollectorRegistry())
        prometheus = Prometheus.configured(self._config.prometheus)
        assert prometheus is not None
        self._prometheus.append(prometheus)
        writer = Writer(self._api, self._cluster, metrics, SCALER)
        self._scaler = Autoscaler(
            self._config, self._cluster, writer, metrics, prometheus, now=self._now
        )

    async def rounds(self, count: int = 1) -> None:
        for _ in range(count):
            await self._scaler.round()
            await self.caught_up()

    def pass_time(self, seconds: float) -> None:
        self._ahead += seconds

    async def caught_up(self) -> None:
        """The watch has brought what was written before this was called."""
        namespace = self._config.namespace
        path = f"/apis/kubediffusion.io/v1alpha1/namespaces/{namespace}/diffusionmodels"
        wanted = _versions((await self._api.request("GET", path))["items"])
        async with asyncio.timeout(30):
            while wanted != _versions(self._cluster.models(namespace).values()):
                self._changed.clear()
                await self._changed.wait()

    async def close(self) -> None:
        for each in self._prometheus:
            await each.close()
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)

    def _now(self) -> float:
        return time.time() + self._ahead


def _versions(models: Iterable[Object]) -> dict[str, str]:
    return {each["metadata"]["name"]: each["metadata"]["resourceVersion"] for each in models}


ScaleBy = Callable[[RealPrometheus], Awaitable[Scaled]]


@pytest.fixture(scope="module")
def space(admin: Kube) -> Iterator[str]:
    """A namespace for all tests of a file: a Prometheus takes seconds to find its targets."""
    name = f"scaling-{secrets.token_hex(3)}"
    admin.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    admin.delete("Namespace", name, missing_ok=True)


@pytest.fixture(scope="module")
def the_exporter() -> Iterator[Exporter]:
    exporter = Exporter(STAGES)
    yield exporter
    exporter.close()


@pytest.fixture(scope="module")
def prometheus(
    tmp_path_factory: pytest.TempPathFactory, space: str, the_exporter: Exporter
) -> Iterator[RealPrometheus]:
    """Running, and scraping `exporter`. It is all tests': leave it so."""
    prometheus = RealPrometheus(tmp_path_factory.mktemp("prometheus"), space)
    prometheus.scrape([the_exporter.port])
    prometheus.start()
    prometheus.wait_for("up", 1)
    yield prometheus
    prometheus.stop()


@pytest.fixture
def exporter(the_exporter: Exporter, prometheus: RealPrometheus) -> Exporter:
    """A gateway that has nothing to do, and Prometheus knows it."""
    for kind in STAGES:
        the_exporter.set(kind)
    the_exporter.hold(0)
    prometheus.wait_for("kubediffusion_gateway_model_tasks", 0)
    prometheus.wait_for("kubediffusion_gateway_requests_now", 0)
    return the_exporter


@pytest.fixture
def new_prometheus(tmp_path: Path, space: str) -> Iterator[NewPrometheus]:
    """Makes one of the test's own, running, and scraping these ports."""
    made: list[RealPrometheus] = []

    def new(ports: Iterable[int], *labels: dict[str, str]) -> RealPrometheus:
        one = RealPrometheus(tmp_path / f"prometheus{len(made)}", space)
        made.append(one)
        one.scrape(ports, *labels)
        one.start()
        return one

    yield new
    for one in made:
        one.stop()


@pytest.fixture
async def scale_by(
    control_plane: ControlPlane, crds: list[str], space: str
) -> AsyncIterator[ScaleBy]:
    """An autoscaler that reads a given Prometheus."""
    made: list[Scaled] = []

    async with await Api.connect(kubeconfig=str(control_plane.kubeconfig())) as api:

        async def scale(prometheus: RealPrometheus) -> Scaled:
            where = ConfiguredPrometheus(url=prometheus.url, timeoutSeconds=5.0)
            config = OperatorConfig(image="n", namespace=space, prometheus=where)
            made.append(Scaled(api, config))
            await made[-1].start()
            return made[-1]

        yield scale
        for each in made:
            await each.close()


@pytest.fixture
async def scaled(scale_by: ScaleBy, prometheus: RealPrometheus) -> Scaled:
    return await scale_by(prometheus)


class Models:
    """DiffusionModels of the test's namespace."""

    def __init__(self, kube: AsyncKube) -> None:
        self._kube = kube

    async def make(self, name: str = "dit", *, replicas: int = 1, **scaling: Any) -> Object:
        """Of workflow ``sd3``, as the operator says it in the status."""
        scaling = {"minReplicas": 1, "maxReplicas": 3, **scaling}
        about = {"apiVersion": "kubediffusion.io/v1alpha1", "kind": "DiffusionModel"}
        spec = {**SPEC, "scaling": scaling}
        body = {**about, "metadata": {"name": name}, "spec": spec}
        await self._kube.apply(body, manager="kubediffusion-operator")
        status = {"referencedBy": [{"name": "sd3", "role": name}]}
        said = {**about, "metadata": {"name": name}, "status": status}
        await self._kube.apply(said, manager="kubediffusion-operator", subresource="status")
        scale = {"spec": {"replicas": replicas}}
        return await self._kube.patch("DiffusionModel", name, scale, subresource="scale")

    async def get(self, name: str = "dit") -> Object:
        return await self._kube.get("DiffusionModel", name)

    async def replicas(self, name: str = "dit") -> int:
        return (await self.get(name))["spec"]["replicas"]

    async def condition(self, kind: str, name: str = "dit") -> tuple[str, str]:
        found = condition(await self.get(name), kind)
        return found.get("status", ""), found.get("reason", "")

    async def message(self, kind: str, name: str = "dit") -> str:
        return condition(await self.get(name), kind).get("message", "")

    async def history(self, name: str = "dit") -> list[tuple[int, int, str]]:
        entries = (await self.get(name)).get("status", {}).get("scalingHistory", ())
        return [(e["fromReplicas"], e["toReplicas"], e["reason"]) for e in entries]


@pytest.fixture
async def models(admin: Kube, space: str, crds: list[str]) -> AsyncIterator[Models]:
    kube = AsyncKube(admin.within(space))
    yield Models(kube)
    for model in await kube.list("DiffusionModel"):
        await kube.delete("DiffusionModel", model["metadata"]["name"])
