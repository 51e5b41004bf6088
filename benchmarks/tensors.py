# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A tensor from one process to another: shared memory beside memcpy, gRPC beside a plain socket.

A second process produces. What counts of shared memory is `put` there and `fetch` here, each by its
own clock: the message that brings the reference over is a message that the task's result takes
anyway, and how soon a busy machine wakes its reader says nothing of tensors.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import grpc.aio
import numpy as np

from benchmarks.common import Row, alternate, at_least
from kubediffusion import rpc
from kubediffusion.local.transfers import FetchOnly
from kubediffusion.tensors import (
    Fetcher,
    Scope,
    TensorStore,
    encode_value,
    tune_malloc,
)
from kubediffusion.v1alpha1 import node_pb2_grpc, tensor_pb2

LARGE = 64 * 2**20
SMALL = 60 * 2**10
SMALL_CALLS = 50
ECHO = "/benchmark.Echo/Echo"
GB = 1e9
# A round takes milliseconds, and one time slice of another process doubles it.
MIN_ROUNDS = 40


def _echo_handler() -> grpc.GenericRpcHandler:
    async def echo(request: tensor_pb2.Value, context: grpc.aio.ServicerContext) -> bytes:
        return b""

    method = grpc.unary_unary_rpc_method_handler(
        echo, request_deserializer=tensor_pb2.Value.FromString
    )
    return grpc.method_handlers_generic_handler("benchmark.Echo", {"Echo": method})


def _send_on_demand(listener: socket.socket, data: np.ndarray) -> None:
    """The plain copy: one byte asks for all of `data`."""
    connection, _ = listener.accept()
    with connection:
        while connection.recv(1):
            connection.sendall(data.data)


def _produce(pipe: Connection, shm_dir: str) -> None:
    """The other process; answers commands on `pipe`."""
    tune_malloc()  # as a node does
    asyncio.run(_Producer(pipe, Path(shm_dir)).serve())


class _Producer:
    def __init__(self, pipe: Connection, shm_dir: Path) -> None:
        self._pipe = pipe
        self._store = TensorStore("producer", budget_bytes=8 * LARGE, shm_dir=shm_dir)
        self._data = np.random.default_rng(0).integers(0, 256, LARGE, dtype=np.uint8)
        self._copy = np.ones_like(self._data)
        self._count = 0

    async def serve(self) -> None:
        server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
        server.add_generic_rpc_handlers((_echo_handler(),))
        node_pb2_grpc.add_ModelNodeServicer_to_server(FetchOnly(self._store), server)
        self._store.address = rpc.bind(server, "127.0.0.1:0")
        await server.start()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            arguments = (listener, self._data)
            threading.Thread(target=_send_on_demand, args=arguments, daemon=True).start()
            self._pipe.send((listener.getsockname(), self._store.address))
            while (command := await asyncio.to_thread(self._pipe.recv)) != "stop":
                self._pipe.send(getattr(self, command)())
        await server.stop(0)
        self._store.close()

    def memcpy(self) -> float:
        start = time.perf_counter()
        np.copyto(self._copy, self._data)
        return time.perf_counter() - start

    def put(self) -> tuple[float, bytes]:
        start = time.perf_counter()
        self._count += 1
        scope = Scope("benchmark", str(self._count))
        ref = self._store.put(scope, "t", self._data, self._data.shape, tensor_pb2.DTYPE_U8)
        return time.perf_counter() - start, ref.SerializeToString()

    def free(self) -> None:
        self._store.release("benchmark", [str(self._count)])


@dataclass
class _Consumer:
    """This process, with the other at the end of `pipe`."""

    loop: asyncio.AbstractEventLoop
    pipe: Connection
    plain: socket.socket
    shm_dir: Path
    buffer: np.ndarray

    def ask(self, command: str) -> object:
        self.pipe.send(command)
        return self.pipe.recv()

    def memcpy(self) -> float:
        """Bytes a second, as all of these."""
        return LARGE / float(self.ask("memcpy"))  # type: ignore[arg-type]

    def shared(self, fetcher: Fetcher, copy_out: bool) -> float:
        """`put` there, then the bytes here."""
        put_seconds, wire = self.ask("put")  # type: ignore[misc]
        start = time.perf_counter()
        data = self.loop.run_until_complete(fetcher.fetch(tensor_pb2.TensorRef.FromString(wire)))
        if copy_out:
            np.copyto(self.buffer, data)
        fetch_seconds = time.perf_counter() - start
        del data
        self.ask("free")
        return LARGE / (put_seconds + fetch_seconds)

    def fetched(self, fetcher: Fetcher, ref: tensor_pb2.TensorRef) -> float:
        start = time.perf_counter()
        self.loop.run_until_complete(fetcher.fetch(ref))
        return LARGE / (time.perf_counter() - start)

    def received(self) -> float:
        start = time.perf_counter()
        self.plain.sendall(b"x")
        view, done = self.buffer.data, 0
        while done < LARGE:
            done += self.plain.recv_into(view[done:])
        return LARGE / (time.perf_counter() - start)


def _small(consumer: _Consumer, address: str) -> tuple[Callable[[], float], Callable[[], float]]:
    """Milliseconds of a call that carries a small tensor, and of the same call without one."""
    store = TensorStore("consumer", budget_bytes=LARGE)
    data = np.arange(SMALL // 4, dtype=np.float32)
    empty = tensor_pb2.Value(text="")

    async def calls(with_tensor: bool) -> float:
        start = time.perf_counter()
        for _ in range(SMALL_CALLS):
            value = empty
            if with_tensor:
                scope = Scope("benchmark", "small")
                ref = store.put(scope, "t", data, data.shape, tensor_pb2.DTYPE_F32)
                value = encode_value(ref)
            await echo(value)
        return (time.perf_counter() - start) / SMALL_CALLS * 1000

    async def connect() -> grpc.aio.UnaryUnaryMultiCallable:
        return rpc.connect(address).unary_unary(
            ECHO, request_serializer=tensor_pb2.Value.SerializeToString
        )

    echo = consumer.loop.run_until_complete(connect())
    return lambda: consumer.loop.run_until_complete(
        calls(True)
    ), lambda: consumer.loop.run_until_complete(calls(False))


def _compare(consumer: _Consumer, address: str, rounds: int) -> list[Row]:
    mapping, remote = Fetcher(shm_dir=consumer.shm_dir), Fetcher()
    rows: list[Row] = []
    for copy_out, name in ((False, "put and get"), (True, "put, get and copy out")):
        rates = alternate(
            lambda out=copy_out: consumer.shared(mapping, out) / GB,
            lambda: consumer.memcpy() / GB,
            rounds,
            warmup=2,
        )
        row = at_least(
            "tensors", f"64 MiB shared memory, {name}, beside memcpy", *rates, "GB/s", 0.8
        )
        rows.append(row if not copy_out else _context(row))

    _, wire = consumer.ask("put")  # type: ignore[misc]
    ref = tensor_pb2.TensorRef.FromString(wire)
    rates = alternate(
        lambda: consumer.fetched(remote, ref) / GB,
        lambda: consumer.received() / GB,
        rounds,
        warmup=2,
    )
    rows.append(at_least("tensors", "64 MiB gRPC, beside a TCP socket", *rates, "GB/s", 0.4))

    with_tensor, without = alternate(*_small(consumer, address), rounds, warmup=2)
    added = statistics.median(with_tensor) - statistics.median(without)
    name, goal = "a 60 KiB tensor adds to a call", "ours <= 1 ms"
    rows.append(Row("tensors", name, added, 0, "ms", goal, added <= 1, rounds))
    for fetcher in (mapping, remote):
        consumer.loop.run_until_complete(fetcher.close())
    return rows


def _context(row: Row) -> Row:
    return Row(row.suite, row.name, row.ours, row.peer, row.unit, "", None, row.rounds)


def run(rounds: int) -> list[Row]:
    """All comparisons, each beside its peer in turn; medians of `rounds`, or of more."""
    rounds = max(rounds, MIN_ROUNDS)
    shm = Path("/dev/shm")
    shm_dir = Path(tempfile.mkdtemp(prefix="kubediffusion-", dir=shm if shm.is_dir() else None))
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=_produce, args=(end, str(shm_dir)), daemon=True)
    process.start()
    end.close()
    tune_malloc()
    try:
        plain, address = pipe.recv()
        with asyncio.Runner() as runner, socket.create_connection(plain) as connection:
            buffer = np.ones(LARGE, np.uint8)
            consumer = _Consumer(runner.get_loop(), pipe, connection, shm_dir, buffer)
            rows = _compare(consumer, address, rounds)
        pipe.send("stop")
        process.join(20)
    finally:
        process.kill()
        process.join()
        shutil.rmtree(shm_dir, ignore_errors=True)
    return rows
