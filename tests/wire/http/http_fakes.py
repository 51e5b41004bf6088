# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A gateway that draws plain colours at once, and a real HTTP server around it."""

from __future__ import annotations

import io
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from PIL import Image

from kubediffusion.v1alpha1 import gateway_pb2, tensor_pb2

PATIENCE = 60.0  # seconds that a test waits for what must happen

Script = Callable[[gateway_pb2.GenerateRequest], AsyncGenerator[gateway_pb2.GenerateEvent, None]]

_TYPES = {
    "prompt": "text",
    "negative_prompt": "text",
    "width": "integer",
    "height": "integer",
    "steps": "integer",
    "guidance": "number",
    "seed": "integer",
    "image": "image",
    "strength": "number",
    "control.edges": "image",
    "control.edges.scale": "number",
    "tiles": "integer",
    "softness": "number",
    "mirrored": "flag",
    "texture": "image",
}


def png(seed: int, width: int = 64, height: int = 48) -> bytes:
    """An image whose pixels tell its seed."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (seed % 256, 100, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def workflow(name: str, *, ready: bool = True) -> gateway_pb2.WorkflowInfo:
    infos = [
        gateway_pb2.InputInfo(name=key, type=kind, required=key == "prompt")
        for key, kind in _TYPES.items()
    ]
    steps = next(info for info in infos if info.name == "steps")
    steps.default.CopyFrom(tensor_pb2.Value(integer=28))
    steps.maximum = 100
    return gateway_pb2.WorkflowInfo(
        name=name, ready=ready, inputs=infos, loras=["pastel"], message="" if ready else "cold"
    )


def _integer(request: gateway_pb2.GenerateRequest, name: str, default: int) -> int:
    return request.inputs[name].integer if name in request.inputs else default


def event(index: int = 0, **kind: object) -> gateway_pb2.GenerateEvent:
    return gateway_pb2.GenerateEvent(request_id="r-1", index=index, **kind)


def image_event(request: gateway_pb2.GenerateRequest, index: int) -> gateway_pb2.GenerateEvent:
    width, height = _integer(request, "width", 64), _integer(request, "height", 48)
    seed = _integer(request, "seed", 0) + index
    picture = gateway_pb2.Image(png=png(seed, width, height), width=width, height=height, seed=seed)
    return event(index, image=picture)


async def draw(
    request: gateway_pb2.GenerateRequest,
) -> AsyncGenerator[gateway_pb2.GenerateEvent, None]:
    """What a gateway says of a request that goes well."""
    yield event(queued=gateway_pb2.Queued(ahead=0))
    for index in range(request.n):
        for number in range(request.previews):
            preview = gateway_pb2.Image(png=png(number, 8, 6), width=8, height=6, step=number + 1)
            yield event(index, preview=preview)
        yield image_event(request, index)
    yield event(finished=gateway_pb2.Finished(seconds=0.1))


class FakeGateway:
    """Follows `script`, remembers what it was asked, and whether every request was closed."""

    def __init__(self) -> None:
        self.workflows = [workflow("shapes")]
        self.script: Script = draw
        self.requests: list[gateway_pb2.GenerateRequest] = []
        self.started = threading.Event()
        self.closed = threading.Event()
        self.open = 0

    async def generate(
        self, request: gateway_pb2.GenerateRequest
    ) -> AsyncGenerator[gateway_pb2.GenerateEvent, None]:
        self.requests.append(request)
        self.open += 1
        events = self.script(request)
        try:
            async for each in events:
                yield each
                self.started.set()
        finally:
            await events.aclose()
            self.open -= 1
            self.closed.set()

    def list_workflows(self) -> list[gateway_pb2.WorkflowInfo]:
        return self.workflows

    @property
    def last(self) -> gateway_pb2.GenerateRequest:
        return self.requests[-1]


class _Server(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self.listening.set()


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """`app` on a free port of 127.0.0.1, in a thread with an event loop of its own."""
    server = _Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    # A request that a failing test left open must not keep the tests from ending.
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert server.listening.wait(PATIENCE)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "requests are still open"
