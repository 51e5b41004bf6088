# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A process with a store and its Fetch, told on stdin what to do: a line in, a line out."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from kubediffusion import rpc
from kubediffusion.tensors import Scope, TensorStore, serve_fetch
from kubediffusion.v1alpha1 import node_pb2_grpc, tensor_pb2


class FetchOnly(node_pb2_grpc.ModelNodeServicer):
    def __init__(self, store: TensorStore) -> None:
        self.store = store

    async def Fetch(
        self, request: tensor_pb2.FetchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[tensor_pb2.FetchChunk]:
        async for chunk in serve_fetch(self.store, request, context):
            yield chunk


async def serve(store: TensorStore, address: str) -> grpc.aio.Server:
    server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
    node_pb2_grpc.add_ModelNodeServicer_to_server(FetchOnly(store), server)
    store.address = rpc.bind(server, address)
    await server.start()
    return server


class Producer:
    """The process, from the test's side."""

    def __init__(self, shm_dir: Path | None, address: str = "127.0.0.1:0") -> None:
        command = [sys.executable, __file__, str(shm_dir or ""), address]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._requests = itertools.count()

    def ask(self, **order: Any) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def put(self, fill: int, size: int) -> tensor_pb2.TensorRef:
        """A tensor of one value, of a request of its own."""
        answer = self.ask(do="put", fill=fill, size=size, request=str(next(self._requests)))
        return tensor_pb2.TensorRef.FromString(base64.b64decode(answer))

    def release(self, ref: tensor_pb2.TensorRef) -> None:
        self.ask(do="release", request=ref.id.split("/")[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(20)


async def main(shm_dir: str, address: str) -> None:
    store = TensorStore("p", budget_bytes=2**30, shm_dir=Path(shm_dir) if shm_dir else None)
    server = await serve(store, address)
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        answer = "done"
        if order["do"] == "put":
            data = np.full(order["size"], order["fill"], np.uint8)
            scope = Scope("g", order["request"])
            ref = store.put(scope, "t/p/1", data, data.shape, tensor_pb2.DTYPE_U8)
            answer = base64.b64encode(ref.SerializeToString()).decode()
        elif order["do"] == "release":
            store.release("g", [order["request"]])
        print(answer, flush=True)
    await server.stop(0)
    store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
