# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The least that grpc.aio can cost: our messages between as many processes, and nothing else.

No workflow, no placement, no bookkeeping, no model and no PNG: constants go from hop to hop, with
the request's id in them, because several requests share a stream. Releases and load reports are
gathered for as long as ours are.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio

from kubediffusion import rpc
from kubediffusion.v1alpha1 import (
    gateway_pb2,
    gateway_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    tensor_pb2,
)

SOCKET = "skeleton.sock"
GATHER_SECONDS = 0.1
STAGES = ("encode", "denoise", "decode")


def processes(folder: Path) -> list[tuple[Callable[..., None], tuple[object, ...]]]:
    addresses = [f"unix:{folder}/skeleton-{stage}.sock" for stage in STAGES]
    nodes = [(serve_node, (address,)) for address in addresses]
    return [*nodes, (serve_gateway, (f"unix:{folder}/{SOCKET}", addresses))]


def serve_node(address: str) -> None:
    async def serve() -> None:
        server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
        node_pb2_grpc.add_ModelNodeServicer_to_server(_Node(), server)
        rpc.bind(server, address)
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


def serve_gateway(address: str, nodes: list[str]) -> None:
    async def serve() -> None:
        gateway = _Gateway(nodes)
        server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
        gateway_pb2_grpc.add_GatewayServicer_to_server(gateway, server)
        rpc.bind(server, address)
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


def _tensor(nbytes: int, shape: list[int]) -> tensor_pb2.Value:
    return tensor_pb2.Value(
        tensor=tensor_pb2.TensorRef(
            id="node/0123456789abcdef0123456789abcdef/task/port/1",
            shape=shape,
            dtype=tensor_pb2.DTYPE_U8,
            nbytes=nbytes,
            incarnation="0123456789abcdef0123456789abcdef",
            inline=bytes(nbytes),
        )
    )


_OUTPUTS = {
    "encode": ("embeds", _tensor(8, [8])),
    "denoise": ("latents", _tensor(8, [8])),
    "decode": ("image", _tensor(192, [8, 8, 3])),
}
_INPUTS = {
    "encode": {"text": tensor_pb2.Value(text="a red circle above a blue square")},
    "denoise": {
        "prompt_1.embeds": _tensor(8, [8]),
        "seed": tensor_pb2.Value(integer=7),
        "steps": tensor_pb2.Value(integer=1),
    },
    "decode": {"latents": _tensor(8, [8])},
}
_HELLO = node_pb2.WorkRequest(
    hello=node_pb2.Hello(
        gateway_id="gateway", protocol=node_pb2.ProtocolRange(min=1, max=1), lease_seconds=30
    )
)
_WELCOME = node_pb2.WorkEvent(welcome=node_pb2.Welcome(protocol=1))
_LOAD = node_pb2.WorkEvent(
    load=node_pb2.LoadReport(queued=3, running=1, queued_seconds=0.004, resident=["standin-encode"])
)
_TIMING = node_pb2.Timing(queue_seconds=0.001, run_seconds=0.001, steps_run=1)


class _Node(node_pb2_grpc.ModelNodeServicer):
    async def Work(self, requests, context) -> AsyncIterator[node_pb2.WorkEvent]:
        loop, reported = asyncio.get_running_loop(), 0.0
        async for request in requests:
            kind = request.WhichOneof("kind")
            if kind == "hello":
                yield _WELCOME
            if kind != "assign":
                continue
            if loop.time() - reported > GATHER_SECONDS:
                reported = loop.time()
                yield _LOAD
            key, stage = request.assign.key, request.assign.stage
            yield node_pb2.WorkEvent(accepted=node_pb2.Accepted(key=key))
            port, value = _OUTPUTS[stage]
            yield node_pb2.WorkEvent(
                done=node_pb2.Done(key=key, outputs={port: value}, timing=_TIMING)
            )


class _Stream:
    """One Work stream: one writer, one reader, requests told apart by their id."""

    def __init__(self, address: str) -> None:
        stub = node_pb2_grpc.ModelNodeStub(rpc.connect(address))
        self._call = stub.Work()
        self._out: asyncio.Queue[node_pb2.WorkRequest] = asyncio.Queue()
        self._out.put_nowait(_HELLO)
        self._ended: list[str] = []
        self._waiting: dict[str, asyncio.Queue[str]] = {}
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    async def _write(self) -> None:
        while True:
            await self._call.write(await self._out.get())

    async def _read(self) -> None:
        async for event in self._call:
            kind = event.WhichOneof("kind")
            if kind in ("welcome", "load"):
                continue
            self._waiting[getattr(event, kind).key.request_id].put_nowait(kind)

    async def events(self, request_id: str, stage: str) -> AsyncIterator[str]:
        queue = self._waiting[request_id] = asyncio.Queue()
        assign = node_pb2.Assign(
            key=node_pb2.TaskKey(request_id=request_id, task=stage, epoch=1),
            model=f"standin-{stage}",
            stage=stage,
            inputs=_INPUTS[stage],
            outputs=[_OUTPUTS[stage][0]],
            workflow="standin",
            weight=1.0,
            numerics=node_pb2.NUMERICS_EXACT,
            expected_seconds=0.001,
        )
        if stage == "denoise":
            assign.lease.checkpoint_every = 5
        self._out.put_nowait(node_pb2.WorkRequest(assign=assign))
        kind = ""
        while kind != "done":
            kind = await queue.get()
            yield kind
        del self._waiting[request_id]

    def release(self, request_id: str) -> None:
        if not self._ended:
            asyncio.get_running_loop().call_later(GATHER_SECONDS, self._release)
        self._ended.append(request_id)

    def _release(self) -> None:
        ids, self._ended = self._ended, []
        release = node_pb2.Release(request_ids=ids)
        self._out.put_nowait(node_pb2.WorkRequest(release=release))


class _Gateway(gateway_pb2_grpc.GatewayServicer):
    def __init__(self, nodes: list[str]) -> None:
        self._nodes = nodes
        self._streams: list[_Stream] = []
        self._ids = itertools.count()

    async def Generate(self, request, context) -> AsyncIterator[gateway_pb2.GenerateEvent]:
        if not self._streams:
            self._streams = [_Stream(address) for address in self._nodes]
        request_id = f"{next(self._ids):032x}"

        def event(**kind: object) -> gateway_pb2.GenerateEvent:
            return gateway_pb2.GenerateEvent(request_id=request_id, **kind)  # type: ignore

        yield event(queued=gateway_pb2.Queued())
        for stage, stream in zip(STAGES, self._streams, strict=True):
            async for kind in stream.events(request_id, stage):
                if kind == "accepted":
                    yield event(started=gateway_pb2.Started(stage=stage, node="node"))
                elif stage == "denoise":  # a node tells of the last step by its result
                    yield event(stepped=gateway_pb2.Stepped(step=1, total_steps=1))
        for stream in self._streams:
            stream.release(request_id)
        yield event(image=gateway_pb2.Image(png=bytes(270), width=8, height=8, seed=7))
        times = [
            gateway_pb2.StageTime(task=s, stage=s, node="node", timing=_TIMING, attempts=1)
            for s in STAGES
        ]
        yield event(finished=gateway_pb2.Finished(stages=times, seconds=0.01))
