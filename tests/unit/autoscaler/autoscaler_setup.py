# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The autoscaler over a small API server in memory, by a clock that the test turns."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from autoscaler_cases import CONFIG, answers
from prometheus_client import CollectorRegistry

from kubediffusion.cluster.api import ApiError
from kubediffusion.telemetry.metrics import OperatorMetrics
from kubediffusion_operator.autoscaler.driver import Autoscaler
from kubediffusion_operator.autoscaler.prometheus import Answer
from kubediffusion_operator.autoscaler.reading import queries
from kubediffusion_operator.cluster import Cluster
from kubediffusion_operator.config import OperatorConfig
from kubediffusion_operator.writing import Writer

START = 1_800_000_000.0


class Numbers:
    """A Prometheus that says what it is told to say."""

    def __init__(self) -> None:
        self.says: Mapping[str, Answer] | Exception = answers()
        self.names = {text: name for name, text in queries(30.0).items()}

    def say(self, *models: str, **more: Any) -> None:
        merged: dict[str, tuple] = {}
        for name in models or ("dit",):
            for field, answer in answers(name, **more).items():
                merged[field] = (*merged.get(field, ()), *answer.samples)
        self.says = {field: Answer(samples) for field, samples in merged.items()}

    async def query(self, expression: str) -> Answer:
        if isinstance(self.says, Exception):
            raise self.says
        return self.says[self.names[expression]]


class Server:
    """DiffusionModels, as far as the autoscaler writes them. `refuse` is raised by each write."""

    def __init__(self, cluster: Cluster, *objects: dict[str, Any]) -> None:
        models = [each for each in objects if each["kind"] == "DiffusionModel"]
        self.objects = {each["metadata"]["name"]: copy.deepcopy(each) for each in models}
        self.cluster = cluster
        self.writes: list[tuple[str, str, Any]] = []
        self.refuse: Exception | None = None
        self.gone: set[str] = set()
        self._version = 100
        for each in objects:
            self._changed(self.objects[each["metadata"]["name"]] if each in models else each)

    async def request(self, method: str, path: str, *, body: Any = None, **_: Any) -> Any:
        if path.endswith("/resourcequotas"):
            return {"items": []}
        *_, name, what = path.split("/")
        if self.refuse is not None:
            raise self.refuse
        if name in self.gone:
            raise ApiError("gone", status=404, reason="NotFound")
        found = self.objects[name]
        self.writes.append((name, what, body["spec"]["replicas"] if what == "scale" else None))
        if what == "scale":
            found["spec"]["replicas"] = body["spec"]["replicas"]
            found["metadata"]["generation"] += 1
            self._version += 1
            found["metadata"]["resourceVersion"] = str(self._version)
            return {"kind": "Scale", "metadata": {"name": name}}
        assert body["metadata"]["uid"] == found["metadata"]["uid"]
        found.setdefault("status", {}).update(copy.deepcopy(body["status"]))
        return self._changed(found)

    def _changed(self, found: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        found["metadata"]["resourceVersion"] = str(self._version)
        self.cluster.wrote(copy.deepcopy(found))
        return copy.deepcopy(found)

    def watch(self) -> None:
        """The watch brings what is there now."""
        for found in self.objects.values():
            self._changed(found)

    def scales(self) -> list[tuple[str, int]]:
        return [(name, replicas) for name, what, replicas in self.writes if what == "scale"]

    def condition(self, type_: str, name: str = "dit") -> tuple[str, str]:
        for each in self.objects[name]["status"].get("conditions", ()):
            if each["type"] == type_:
                return each["status"], each["reason"]
        return "", ""

    def history(self, name: str = "dit") -> list[tuple[int, int, str]]:
        entries = self.objects[name]["status"].get("scalingHistory", ())
        return [(e["fromReplicas"], e["toReplicas"], e["reason"]) for e in entries]


class Setup:
    def __init__(self, *objects: dict[str, Any], config: OperatorConfig = CONFIG) -> None:
        self.now = START
        self.config = config
        self.numbers = Numbers()
        self.cluster = Cluster(lambda namespace: None, now=lambda: self.now)
        self.server = Server(self.cluster, *objects)
        self.registry = CollectorRegistry()
        self.metrics = OperatorMetrics(self.registry)
        self.restart()

    def restart(self) -> None:
        """A fresh process."""
        writer = Writer(
            self.server,  # pyright: ignore[reportArgumentType]
            self.cluster,
            self.metrics,
            "kubediffusion-autoscaler",
            jitter=lambda: 0.0,
        )
        self.scaler = Autoscaler(
            self.config,
            self.cluster,
            writer,
            self.metrics,
            self.numbers,  # pyright: ignore[reportArgumentType]
            now=lambda: self.now,
        )

    async def rounds(self, count: int = 1, seconds: float = 5.0) -> list[tuple[str, int]]:
        """The scalings of so many rounds."""
        before = len(self.server.scales())
        for _ in range(count):
            await self.scaler.round()
            self.server.watch()
            self.now += seconds
        return self.server.scales()[before:]

    def outcome(self, outcome: str) -> float:
        name = "kubediffusion_operator_autoscale_seconds_count"
        return self.registry.get_sample_value(name, {"outcome": outcome}) or 0.0
