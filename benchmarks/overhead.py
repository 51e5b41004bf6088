# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What the service itself costs: three stages whose models take no time.

Ours is the real gateway process over three real node processes (family `standin`). The peer is a
bare grpc.aio skeleton (`peers/skeleton.py`) of as many processes that sends the same messages and
does nothing else. One client drives both in turn, over unix sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import grpc.aio

from benchmarks.common import Row, alternate, at_least
from benchmarks.peers import skeleton, standin_service
from kubediffusion import rpc
from kubediffusion.v1alpha1 import gateway_pb2, gateway_pb2_grpc, tensor_pb2

SEQUENTIAL = 50  # requests one after the other, for one figure of latency
CONCURRENT = 16  # clients at a time, for one figure of throughput
REQUESTS = 640
MAX_ADDED_MS = 10.0
MIN_SHARE = 0.6

REQUEST = gateway_pb2.GenerateRequest(
    workflow=standin_service.WORKFLOW,
    inputs={
        "prompt": tensor_pb2.Value(text="a red circle above a blue square"),
        "steps": tensor_pb2.Value(integer=1),
        "seed": tensor_pb2.Value(integer=7),
    },
)


def run(rounds: int = 10) -> list[Row]:
    """The rows of the suite `overhead`."""
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as folder:
        path = Path(folder)
        with (
            _processes(standin_service.processes(path)),
            _processes(skeleton.processes(path)),
            asyncio.Runner() as runner,
        ):
            ours = runner.run(_Client.connect(f"unix:{path}/{standin_service.SOCKET}"))
            peer = runner.run(_Client.connect(f"unix:{path}/{skeleton.SOCKET}"))
            try:
                latency = alternate(
                    lambda: runner.run(ours.latency_ms()),
                    lambda: runner.run(peer.latency_ms()),
                    rounds,
                )
                throughput = alternate(
                    lambda: runner.run(ours.per_second()),
                    lambda: runner.run(peer.per_second()),
                    rounds,
                )
            finally:
                runner.run(ours.close())
                runner.run(peer.close())
    return [_latency_row(*latency), _throughput_row(*throughput)]


def _latency_row(ours: Sequence[float], peer: Sequence[float]) -> Row:
    row = at_least("overhead", "three stages, one client", ours, peer, "ms", 0.0)
    return Row(
        **{
            **{name: getattr(row, name) for name in Row.__dataclass_fields__},
            "goal": f"ours <= {MAX_ADDED_MS:g} ms",
            "reached": row.ours <= MAX_ADDED_MS,
            "note": f"median of {SEQUENTIAL} a round; the models take no time",
        }
    )


def _throughput_row(ours: Sequence[float], peer: Sequence[float]) -> Row:
    note = f"{CONCURRENT} clients, {REQUESTS} requests a round"
    return at_least(
        "overhead", "three stages, many clients", ours, peer, "workflows/s", MIN_SHARE, note
    )


class _Client:
    """One channel, as an application has it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._stub = gateway_pb2_grpc.GatewayStub(channel)

    @classmethod
    async def connect(cls, address: str) -> _Client:
        client = cls(rpc.connect(address))
        async with asyncio.timeout(120):
            while True:
                try:
                    await client.one()
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                    await asyncio.sleep(0.05)
                else:
                    return client

    async def one(self) -> None:
        images = 0
        async for event in self._stub.Generate(REQUEST):
            images += event.WhichOneof("kind") == "image"
        assert images == 1

    async def latency_ms(self) -> float:
        seconds: list[float] = []
        for _ in range(SEQUENTIAL):
            start = time.perf_counter()
            await self.one()
            seconds.append(time.perf_counter() - start)
        return sorted(seconds)[SEQUENTIAL // 2] * 1000

    async def per_second(self) -> float:
        left = iter(range(REQUESTS))

        async def client() -> None:
            for _ in left:
                await self.one()

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(CONCURRENT)))
        return REQUESTS / (time.perf_counter() - start)

    async def close(self) -> None:
        await self._channel.close()


@contextlib.contextmanager
def _processes(targets: Sequence[tuple[object, tuple[object, ...]]]) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        for target, arguments in targets
    ]
    try:
        for process in started:
            process.start()
        yield
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.join()


if __name__ == "__main__":
    from rich.console import Console

    from benchmarks.run import table

    Console().print(table(run()))
