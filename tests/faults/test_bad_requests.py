# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A thousand bad or abandoned requests, mixed: each gets its answer, and nothing stays behind."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from kubediffusion import rpc
from kubediffusion.errors import InvalidInput, KubeDiffusionError, NotFound
from kubediffusion.gateway.http import build_app
from kubediffusion.local.runtime import LocalRuntime
from kubediffusion.tensors import encode_value
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2, node_pb2_grpc

REQUESTS = 1000
AT_ONCE = 16

WORKFLOW = """
apiVersion: kubediffusion.io/v1alpha1
kind: DiffusionWorkflow
metadata: {name: small}
spec:
  pipeline:
    preset: StableDiffusion3
    source: {uri: "file://pipeline"}
  controlNets:
    - {name: edges, source: {uri: "file://pipeline/controlnet_0"}}
  loras:
    - {name: style, source: {uri: "file://pipeline/lora_0"}}
  inputs:
    steps: {default: 4, maximum: 8}
"""


def png(size: tuple[int, int] = (32, 32)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, "PNG")
    return out.getvalue()


def bomb() -> bytes:
    """Some kilobytes that say they are 60,000 pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


# What is wrong, and the field that the answer must name ("" where it is about none).
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown workflow": ({"workflow": "smal"}, "workflow"),
    "unknown input": ({"inputs": {"promt": "a circle"}}, "inputs.promt"),
    "no prompt": ({"inputs": {"prompt": None}}, "inputs.prompt"),
    "wrong type": ({"inputs": {"steps": "many"}}, "inputs.steps"),
    "prompt too long": ({"inputs": {"prompt": "circle " * 400}}, "inputs.prompt"),
    "size off the grid": ({"inputs": {"width": 33}}, "inputs.width"),
    "size too large": ({"inputs": {"height": 4096}}, "inputs.height"),
    "too many steps": ({"inputs": {"steps": 9}}, "inputs.steps"),
    "no steps": ({"inputs": {"steps": 0}}, "inputs.steps"),
    "not a number": ({"inputs": {"guidance": float("nan")}}, "inputs.guidance"),
    "no image at all": ({"inputs": {"image": b"GIF89a nonsense"}}, "inputs.image"),
    "half an image": ({"inputs": {"image": png()[:60]}}, "inputs.image"),
    "decompression bomb": ({"inputs": {"image": bomb()}}, "inputs.image"),
    "bad control image": ({"inputs": {"control.edges": b"\x89PNG"}}, "inputs.control.edges"),
    "scale without control": ({"inputs": {"control.edges.scale": 0.5}}, "inputs.control.edges"),
    "undeclared LoRA": ({"loras": {"other": 1.0}}, "loras.other"),
    "wild LoRA": ({"loras": {"style": 1e9}}, "loras.style"),
    "too many images": ({"n": 5000}, "n"),
}


def request(change: dict[str, Any]) -> gateway_pb2.GenerateRequest:
    inputs: dict[str, Any] = {"prompt": "a red circle", "steps": 4, **change.get("inputs", {})}
    return gateway_pb2.GenerateRequest(
        workflow=change.get("workflow", "small"),
        inputs={k: encode_value(v) for k, v in inputs.items() if v is not None},
        loras=change.get("loras", {}),
        n=change.get("n", 1),
    )


@pytest.fixture
def workflow_file(tmp_path: Path) -> Path:
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
    from small_pipelines import make_sd3

    make_sd3(tmp_path / "pipeline", controlnets=1, loras=1)
    file = tmp_path / "small.yaml"
    file.write_text(WORKFLOW)
    return file


async def refused(runtime: LocalRuntime, name: str) -> None:
    change, field = BAD[name]
    with pytest.raises(KubeDiffusionError) as caught:
        async for _ in runtime.generate(request(change)):
            pass
    assert isinstance(caught.value, InvalidInput | NotFound), f"{name}: {caught.value!r}"
    assert caught.value.field.startswith(field), f"{name}: {caught.value!r}"


async def refused_by_http(http: httpx.AsyncClient, luck: random.Random) -> None:
    body: dict[str, Any] = {"model": "small", "prompt": "a circle"}
    body |= luck.choice(
        [
            {"n": 99},
            {"size": "31x31"},
            {"model": "nobody"},
            {"sise": "32x32"},
            {"control": {"edges": {"image": base64.b64encode(b"no").decode()}}},
            {"loras": {"other": 1}},
            {"steps": 10**9},
        ]
    )
    answer = await http.post("/v1/images/generations", json=body)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["message"]


async def abandoned(runtime: LocalRuntime, luck: random.Random) -> None:
    """The client leaves after some events."""
    good = {"inputs": {"image": png(), "control.edges": png()}, "loras": {"style": 0.7}}
    events = runtime.generate(request(good))
    left = luck.randrange(6)
    async for _ in events:
        left -= 1
        if left < 0:
            break
    await events.aclose()  # type: ignore[attr-defined]


async def eventually(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(240):
        while not check():  # noqa: ASYNC110 - counts of others, who tell nobody
            await asyncio.sleep(0.02)


@pytest.mark.usefixtures("fork_server")
async def test_a_thousand_bad_requests_leave_nothing_behind(
    workflow_file: Path, run_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run_base))
    luck = random.Random(11)
    seen: Counter[str] = Counter()
    names = [*BAD]
    async with LocalRuntime([workflow_file]) as runtime:
        await runtime.ready()
        app = build_app(runtime.gateway)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        numbers = iter(range(REQUESTS))

        async def client(http: httpx.AsyncClient) -> None:
            for number in numbers:
                kind = number % 10
                if kind == 0:
                    await abandoned(runtime, luck)
                elif kind == 1:
                    await refused_by_http(http, luck)
                else:
                    await refused(runtime, names[luck.randrange(len(names))])
                seen["abandoned" if kind == 0 else "http" if kind == 1 else "refused"] += 1

        async with (
            httpx.AsyncClient(transport=transport, base_url="http://test") as http,
            asyncio.TaskGroup() as clients,
        ):
            for _ in range(AT_ONCE):
                clients.create_task(client(http))

        assert seen.total() == REQUESTS
        await eventually(lambda: not held(runtime))
        for address in runtime.supervisor.addresses:
            await node_is_empty(address)
        # And the service still serves.
        kinds = [e.WhichOneof("kind") async for e in runtime.generate(request({}))]
        assert "image" in kinds
    assert not runtime.folder.shm.exists()
    assert not [name for _, _, files in os.walk(run_base) for name in files]


def held(runtime: LocalRuntime) -> dict[str, int]:
    """What the gateway still has of any request; results kept for their keys are bounded."""
    kept = ("releases", "results")
    return {k: v for k, v in runtime.gateway.debug_counts().items() if v and k not in kept}


async def node_is_empty(address: str) -> None:
    channel = rpc.connect(address)
    try:
        stub: Any = node_pb2_grpc.ModelNodeStub(channel)
        async with asyncio.timeout(240):
            while True:
                described = await stub.Describe(node_pb2.DescribeRequest(), timeout=240)
                load = described.load
                if not (load.tensors or load.tensor_bytes or load.queued or load.running):
                    return
                await asyncio.sleep(0.02)
    finally:
        await channel.close()
