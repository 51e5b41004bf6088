# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How long a tensor takes from one process to another: through shared memory, and by gRPC."""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import grpc.aio
import numpy as np

from kubediffusion import rpc
from kubediffusion.errors import Internal
from kubediffusion.tensors import Fetcher, Scope, TensorStore, serve_fetch, tune_malloc
from kubediffusion.v1alpha1 import node_pb2_grpc, tensor_pb2

SIZES = tuple(2**power for power in range(10, 27, 2))
_SCOPE = Scope("profile", "transfers")
_START_SECONDS = 120


def measure_transfers(
    rounds: int, sizes: Sequence[int] = SIZES
) -> tuple[dict[int, float], dict[int, float]]:
    """Median seconds to fetch a tensor by bytes: on this host, and as from another one.

    The second goes over gRPC on the loopback: what the way itself costs, without a network.
    """
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="kubediffusion-", dir=shm if shm.is_dir() else None))
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=_produce, args=(end, str(folder), tuple(sizes)), daemon=True)
    process.start()
    end.close()
    tune_malloc()
    try:
        if not pipe.poll(_START_SECONDS):
            raise Internal("the process that makes tensors to measure did not start")
        refs = [tensor_pb2.TensorRef.FromString(each) for each in pipe.recv()]
        return asyncio.run(_fetch_all(refs, folder, rounds))
    except EOFError:
        raise Internal("the process that makes tensors to measure died; see above") from None
    finally:
        pipe.close()
        process.join(5)
        process.kill()
        process.join()
        shutil.rmtree(folder, ignore_errors=True)


async def _fetch_all(
    refs: Sequence[tensor_pb2.TensorRef], folder: Path, rounds: int
) -> tuple[dict[int, float], dict[int, float]]:
    local, remote = Fetcher(shm_dir=folder), Fetcher()
    try:
        same = {ref.nbytes: await _fetch(local, ref, rounds) for ref in refs}
        other = {ref.nbytes: await _fetch(remote, ref, rounds) for ref in refs}
    finally:
        await local.close()
        await remote.close()
    return same, other


async def _fetch(fetcher: Fetcher, ref: tensor_pb2.TensorRef, rounds: int) -> float:
    seconds: list[float] = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        await fetcher.fetch(ref)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first one connects, or maps


# ---------------------------------------------------------------- the other process


class FetchOnly(node_pb2_grpc.ModelNodeServicer):
    """A node that has tensors and nothing else."""

    def __init__(self, store: TensorStore) -> None:
        self._store = store

    async def Fetch(  # noqa: N802 (the name of the call)
        self, request: tensor_pb2.FetchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[tensor_pb2.FetchChunk]:
        async for chunk in serve_fetch(self._store, request, context):
            yield chunk


def _produce(pipe: Connection, folder: str, sizes: Sequence[int]) -> None:
    tune_malloc()
    asyncio.run(_serve(pipe, Path(folder), sizes))


async def _serve(pipe: Connection, folder: Path, sizes: Sequence[int]) -> None:
    """Until the other end of the pipe is closed."""
    store = TensorStore("profile", budget_bytes=4 * max(sizes), shm_dir=folder)
    server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
    node_pb2_grpc.add_ModelNodeServicer_to_server(FetchOnly(store), server)
    store.address = rpc.bind(server, "127.0.0.1:0")
    await server.start()
    refs: list[bytes] = []
    for nbytes in sizes:
        data = np.zeros(nbytes, np.uint8)
        name = f"{nbytes}/data/1"
        ref = store.put(_SCOPE, name, data, data.shape, tensor_pb2.DTYPE_U8, inline=False)
        refs.append(ref.SerializeToString())
    pipe.send(refs)
    await asyncio.to_thread(pipe.poll, None)
    await server.stop(0)
    store.close()
