# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a gateway is told, when it cannot take what it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kubediffusion.api import load_workflow
from kubediffusion.cluster.follow import Follower
from kubediffusion.gateway.readiness import Readiness
from kubediffusion.workflow import PipelineIndex, ResolvedWorkflow
from kubediffusion.workflow.revision import encode

INDEX = PipelineIndex(
    {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
)
BODY = {
    "apiVersion": "kubediffusion.io/v1alpha1",
    "kind": "DiffusionWorkflow",
    "metadata": {"name": "sd3", "namespace": "here", "uid": "u", "resourceVersion": "1"},
    "spec": {
        "pipeline": {"preset": "StableDiffusion3", "source": {"uri": "file:///models/one"}},
        "models": {"text_encoder_3": {"enabled": False}},
    },
}


def revision(name: str) -> dict[str, Any]:
    text = json.dumps({**BODY, "metadata": {"name": "sd3"}})
    return {
        "metadata": {"name": name, "namespace": "here", "uid": name, "resourceVersion": "1"},
        "data": encode(load_workflow(text), INDEX, {}),
    }


SLICE = {
    "metadata": {"name": "s", "namespace": "here", "uid": "s", "resourceVersion": "1"},
    "addressType": "IPv4",
    "ports": [{"name": "grpc", "port": 7070}],
    "endpoints": [{"addresses": ["10.0.0.7"], "conditions": {"ready": True}}],
}


class Server:
    """Lists what there is, and then says what is put into `changes`, by collection."""

    def __init__(self) -> None:
        self.objects: dict[str, list[dict[str, Any]]] = {
            "diffusionworkflows": [{**BODY, "status": {"revision": "sd3-1"}}],
            "controllerrevisions": [revision("sd3-1")],
            "endpointslices": [SLICE],
        }
        self.changes: dict[str, asyncio.Queue[dict[str, Any]]] = {
            name: asyncio.Queue() for name in self.objects
        }

    async def request(self, method: str, path: str, *, params: Any = None) -> dict[str, Any]:
        items = self.objects[path.rpartition("/")[2]]
        return {"kind": "List", "metadata": {"resourceVersion": "1"}, "items": items}

    @asynccontextmanager
    async def stream(
        self, path: str, params: Any, *, silence: float
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        queue = self.changes[path.rpartition("/")[2]]

        async def events() -> AsyncIterator[dict[str, Any]]:
            while True:
                yield await queue.get()

        yield events()


class Gateway:
    """Fails the first `failures` times that it is told of `what`."""

    def __init__(self, what: str, failures: int) -> None:
        self.unsynced = ""
        self.told: list[str] = []
        self.fully = asyncio.Event()
        self._what, self._failures = what, failures

    def _take(self, what: str) -> None:
        if what == self._what and self._failures:
            self._failures -= 1
            raise RuntimeError("it cannot be taken now")
        self.told.append(what)
        if {"nodes", "workflows"} <= {*self.told}:
            self.fully.set()

    def set_nodes(self, addresses: Sequence[str]) -> None:
        assert addresses == ("10.0.0.7:7070",)
        self._take("nodes")

    def set_workflows(
        self,
        workflows: Mapping[str, ResolvedWorkflow],
        draining: Iterable[str],
    ) -> None:
        assert list(workflows) == ["sd3"]
        assert not [*draining]
        self._take("workflows")


@pytest.mark.parametrize("what", ["nodes", "workflows"])
async def test_what_could_not_be_taken_is_told_again_though_nothing_changes(what: str) -> None:
    gateway, readiness = Gateway(what, failures=2), Readiness()
    async with Follower(Server(), gateway, "here", readiness, retry_seconds=0.001) as follower:
        assert readiness.why
        async with asyncio.timeout(20):
            await gateway.fully.wait()
            await asyncio.sleep(0)
        # Each part once, whichever failed.
        assert sorted(gateway.told) == ["nodes", "workflows"]
        assert (readiness.why, gateway.unsynced) == ("", "")
        assert follower.view.addresses == ("10.0.0.7:7070",)
