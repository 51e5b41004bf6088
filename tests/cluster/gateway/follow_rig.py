# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What an operator, kubelets and kube-proxy do, by hand: revisions, node processes, slices."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import json_format

from kubediffusion.api import load_workflow
from kubediffusion.local.specs import model_spec
from kubediffusion.models.standin import STANDIN
from kubediffusion.node.config import NodeConfig
from kubediffusion.node.library import Library
from kubediffusion.node.process import run_process
from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc
from kubediffusion.workflow import PipelineIndex, ResolvedWorkflow
from kubediffusion.workflow.revision import decode, encode, revision_name
from tests.cluster.kube import Kube, Object

WAIT = 120.0
MANAGED = {"app.kubernetes.io/managed-by": "kubediffusion"}
INDEX = PipelineIndex(
    {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["kubediffusion.node.process", "kubediffusion.models.standin"])


def until(condition: Callable[[], Any], what: str) -> Any:
    """Blocking: for what happens in another process and tells nobody."""
    end = time.monotonic() + WAIT
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.02)
    return found


# ---------------------------------------------------------------- the operator's part


class Revised:
    """A workflow `name` whose weights are at `uri`, as an operator keeps it."""

    def __init__(self, name: str, uri: str, index: PipelineIndex = INDEX) -> None:
        self.body: Object = {
            "apiVersion": "kubediffusion.io/v1alpha1",
            "kind": "DiffusionWorkflow",
            "metadata": {"name": name},
            "spec": {"pipeline": {"preset": "StableDiffusion3", "source": {"uri": uri}}},
        }
        self.name = name
        self.data = encode(load_workflow(json.dumps(self.body)), index, {})
        self.revision = revision_name(name, self.data)
        self.resolved: ResolvedWorkflow = decode(self.data)

    def publish(self, kube: Kube, number: int = 1) -> None:
        """The workflow, its ControllerRevision, and last of all its status."""
        kube.apply(self.body)
        self.keep(kube, number)
        self.serve(kube)

    def keep(self, kube: Kube, number: int, data: Object | None = None) -> None:
        owner = kube.get("DiffusionWorkflow", self.name)
        kube.create(
            {
                "apiVersion": "apps/v1",
                "kind": "ControllerRevision",
                "metadata": {
                    "name": self.revision,
                    "labels": {**MANAGED, "kubediffusion.io/workflow": self.name},
                    "ownerReferences": [
                        {
                            "apiVersion": owner["apiVersion"],
                            "kind": owner["kind"],
                            "name": self.name,
                            "uid": owner["metadata"]["uid"],
                        }
                    ],
                },
                "revision": number,
                "data": self.data if data is None else data,
            }
        )

    def serve(self, kube: Kube, revision: str = "") -> None:
        status = {"status": {"revision": revision or self.revision}}
        kube.patch("DiffusionWorkflow", self.name, status, subresource="status")


# ---------------------------------------------------------------- the kubelets' part


def own_address() -> str:
    """This machine's, but no loopback one: an API server takes none of those in a slice."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("NOT TESTED: this machine has no address but the loopback")
        return probe.getsockname()[0]


class NoFiles:
    path = Path("/nonexistent")


def serve_standins(config: NodeConfig) -> None:
    """A real node; models of any family weigh nothing."""
    run_process(config, Library(lambda name: STANDIN, lambda *a, **k: NoFiles()))


class NodePod:
    """A node process with all models of a workflow. Its name is its pod's."""

    def __init__(
        self, folder: Path, name: str, workflow: ResolvedWorkflow, step_seconds: float = 0.01
    ) -> None:
        plan = node_pb2.SetResidencyRequest(generation=1, planner="operator")
        for model in workflow.models.values():
            spec = model_spec(model)
            spec.options["step_seconds"] = str(step_seconds)
            plan.models.append(spec)
        self.name, self._announced = name, folder / f"{name}.json"
        (folder / f"{name}.plan").write_text(json_format.MessageToJson(plan))
        config = NodeConfig(
            node_id=name,
            address=f"{own_address()}:0",
            threads=1,
            announce_path=self._announced,
            residency=folder / f"{name}.plan",
            drain_seconds=60.0,
        )
        self.process = _context.Process(target=serve_standins, args=(config,))
        self.process.start()

    @property
    def address(self) -> str:
        """Blocking, until it listens."""
        until(lambda: self._announced.exists() or not self.process.is_alive(), self.name)
        return json.loads(self._announced.read_text())["address"]

    def ready(self) -> NodePod:
        """Blocking, until its models are there."""
        with grpc.insecure_channel(self.address) as channel:
            stub = node_pb2_grpc.ModelNodeStub(channel)

            def loaded() -> bool:
                models = stub.Describe(node_pb2.DescribeRequest()).models
                return all(each.state == node_pb2.MODEL_STATE_READY for each in models)

            until(loaded, f"{self.name} is ready")
        return self

    def needed(self) -> set[str]:
        """Models that gateways need here, as an operator hears it."""
        with grpc.insecure_channel(self.address) as channel:
            said = node_pb2_grpc.ModelNodeStub(channel).Describe(node_pb2.DescribeRequest())
        return {status.identity for status in said.models if status.needed_by}

    def terminate(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGTERM)

    def exit_code(self) -> int | None:
        """Blocking, until it ends."""
        self.process.join(WAIT)
        return self.process.exitcode


def publish_slice(
    kube: Kube, name: str, pods: Iterable[NodePod], terminating: Iterable[NodePod] = ()
) -> None:
    """EndpointSlices of a headless Service over `pods`: one a pod, because ports differ here."""
    going = {pod.name for pod in terminating}
    for pod in pods:
        host, _, port = pod.address.rpartition(":")
        kube.apply(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": f"{name}-{pod.name}",
                    "labels": {**MANAGED, "kubernetes.io/service-name": name},
                },
                "addressType": "IPv4",
                "ports": [{"name": "grpc", "port": int(port), "protocol": "TCP"}],
                "endpoints": [
                    {
                        "addresses": [host],
                        "conditions": {
                            "ready": pod.name not in going,
                            "serving": True,
                            "terminating": pod.name in going,
                        },
                        "targetRef": {"kind": "Pod", "name": pod.name, "uid": f"uid-{pod.name}"},
                    }
                ],
            }
        )


# ---------------------------------------------------------------- the gateway's pod


class GatewayPod:
    """The real program, by its environment."""

    def __init__(self, folder: Path, name: str, kubeconfig: Path, **variables: str) -> None:
        self.name, self._announced = name, folder / f"{name}.json"
        self._announced.unlink(missing_ok=True)
        self.log = folder / f"{name}.log"
        values = {
            "GATEWAY_ID": name,
            "HTTP": "127.0.0.1:0",
            "GRPC": "127.0.0.1:0",
            "METRICS": "127.0.0.1:0",
            "ANNOUNCE_PATH": str(self._announced),
            "SHUTDOWN_DELAY": "0",
            "DRAIN_SECONDS": "60",
            **variables,
        }
        environ = {f"KUBEDIFFUSION_{key}": value for key, value in values.items()}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kubediffusion.cluster"],
                env={**os.environ, "KUBECONFIG": str(kubeconfig), **environ},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _door(self, name: str) -> str:
        def announced() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return self._announced.exists()

        until(announced, f"{self.name} listens")
        return json.loads(self._announced.read_text())[name]

    @property
    def grpc(self) -> str:
        return self._door("grpc")

    @property
    def http(self) -> str:
        return f"http://{self._door('http')}"

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.http}{path}", trust_env=False, timeout=30)

    @property
    def is_ready(self) -> bool:
        try:
            return self.get("/readyz").is_success
        except httpx.TransportError:
            return False

    def ready(self) -> GatewayPod:
        until(lambda: self.is_ready, f"{self.name} is ready")
        return self

    def terminate(self) -> None:
        self.process.terminate()

    def exit_code(self) -> int:
        return self.process.wait(WAIT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


# ---------------------------------------------------------------- kube-proxy's part


class Service:
    """A TCP address in front of gateways: a new connection goes to a ready one, by chance, and an
    old one stays where it is. An async context manager."""

    def __init__(self, door: str, pods: list[GatewayPod]) -> None:
        self.pods = pods
        self.address = ""
        self._door = door
        self._ready: list[str] = []
        self._random = random.Random(7)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Service:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname()[:2])
        await self._look()
        self._looking = asyncio.create_task(self._look_on())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._looking.cancel()
        self._server.close()
        for task in self._tasks:
            task.cancel()

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            await self._look()

    async def _look(self) -> None:
        def ready() -> list[str]:
            return [pod._door(self._door) for pod in [*self.pods] if pod.is_ready]

        self._ready = await asyncio.to_thread(ready)

    async def _connected(self, inside: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        try:
            host, _, port = self._random.choice(self._ready).rpartition(":")
            outside, forth = await asyncio.open_connection(host, int(port))
        except (OSError, IndexError):
            back.close()
            return
        for reader, writer in ((inside, forth), (outside, back)):
            task = asyncio.create_task(self._copy(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
