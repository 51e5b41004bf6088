# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Clients: requests come at random times, whatever became of those before."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from benchmarks.chaos.fleet import CHECKPOINT_EVERY
from kubediffusion import rpc
from kubediffusion.tensors import encode_value
from kubediffusion.v1alpha1 import gateway_pb2, gateway_pb2_grpc

# Codes that say nothing of the request: the client asks the other gateway.
_ELSEWHERE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)
_ENDED = (
    gateway_pb2.JOB_STATE_SUCCEEDED,
    gateway_pb2.JOB_STATE_FAILED,
    gateway_pb2.JOB_STATE_CANCELLED,
)
PICTURES = 40  # different requests: so many are drawn undisturbed beforehand
POLL = 0.25
GRACE = 5.0  # for the answer to a request whose deadline is over


@dataclass
class Tally:
    """What became of the requests."""

    streams: int = 0
    jobs: int = 0
    resumed: int = 0
    sent_again: int = 0
    seconds: list[float] = field(default_factory=list[float])
    wrong: list[str] = field(default_factory=list[str])

    @property
    def done(self) -> int:
        return len(self.seconds)

    def percentile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else 0.0


class Load:
    def __init__(
        self,
        workflow: str,
        inputs: Mapping[str, str | int | float],
        doors: Sequence[str],
        deadline: float,
    ) -> None:
        self.tally = Tally()
        self._workflow = workflow
        self._inputs = inputs
        self._deadline = deadline
        self._channels = [rpc.connect(door) for door in doors]
        self._stubs = [gateway_pb2_grpc.GatewayStub(channel) for channel in self._channels]
        self._right: dict[int, bytes] = {}

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def undisturbed(self, pictures: int = PICTURES) -> None:
        """Draws what the requests will ask for, once all models are there: nothing is wrong yet."""
        for seed in range(pictures):
            self._right[seed] = await self._stream(self._request(seed, f"calm-{seed}"), 0)
        if len(set(self._right.values())) != pictures:
            raise AssertionError("different requests gave equal pictures: nothing could be told")
        self.tally = Tally()

    async def run(
        self, count: int, seconds: float, seed: int, on_done: Callable[[], None] = lambda: None
    ) -> None:
        """`count` Poisson arrivals within about `seconds`; returns when all have been answered."""
        draw = random.Random(seed)
        begin = time.monotonic()
        at = 0.0
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                at += draw.expovariate(count / seconds)
                await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
                picture, first = draw.randrange(len(self._right)), draw.randrange(2)
                way = self._stream if draw.random() < 0.7 else self._job
                request = self._request(picture, f"{seed}-{number}")
                task = group.create_task(self._answered(way, request, picture, first))
                task.add_done_callback(lambda _: on_done())

    async def left_on(self, addresses: Sequence[str]) -> int:
        """Tensors that nodes keep."""
        from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc

        left = 0
        for address in addresses:
            async with rpc.connect(address) as channel:
                stub = node_pb2_grpc.ModelNodeStub(channel)
                left += (await stub.Describe(node_pb2.DescribeRequest(), timeout=10)).load.tensors
        return left

    # ------------------------------------------------------------ one request

    def _request(self, seed: int, key: str) -> gateway_pb2.GenerateRequest:
        inputs = {**self._inputs, "seed": seed}
        return gateway_pb2.GenerateRequest(
            workflow=self._workflow,
            inputs={name: encode_value(value) for name, value in inputs.items()},
            idempotency_key=key,
            deadline_ms=int(self._deadline * 1000),
        )

    async def _answered(
        self,
        way: Callable[[gateway_pb2.GenerateRequest, int], Awaitable[bytes]],
        request: gateway_pb2.GenerateRequest,
        picture: int,
        first: int,
    ) -> None:
        """Whatever happens goes into the tally: one bad answer must not hide the others."""
        start = time.monotonic()
        key = request.idempotency_key
        try:
            async with asyncio.timeout(self._deadline + GRACE):
                png = await way(request, first)
        except TimeoutError:
            self.tally.wrong.append(f"{key}: no answer within its deadline")
        except grpc.aio.AioRpcError as error:
            self.tally.wrong.append(f"{key}: {error.code().name} {error.details()}")
        except AssertionError as error:
            self.tally.wrong.append(f"{key}: {error}")
        else:
            self.tally.seconds.append(time.monotonic() - start)
            if png != self._right[picture]:
                self.tally.wrong.append(f"{key}: another picture than undisturbed")

    async def _stream(self, request: gateway_pb2.GenerateRequest, first: int) -> bytes:
        self.tally.streams += 1
        attempt = first
        while True:
            try:
                return await self._follow(self._stubs[attempt % len(self._stubs)], request)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _ELSEWHERE:
                    raise
            self.tally.sent_again += 1
            attempt += 1
            await asyncio.sleep(POLL)

    async def _follow(
        self, stub: gateway_pb2_grpc.GatewayStub, request: gateway_pb2.GenerateRequest
    ) -> bytes:
        png, highest = b"", 0
        async for event in stub.Generate(request):
            kind = event.WhichOneof("kind")
            if kind == "image":
                png = event.image.png
            elif kind == "stepped":
                highest = max(highest, event.stepped.step)
            elif kind == "resumed" and event.resumed.stage == "denoise":
                self.tally.resumed += 1
                again = highest - event.resumed.from_step
                assert again <= CHECKPOINT_EVERY, f"{again} steps ran again: {event.resumed.reason}"
        assert png, "the stream ended without a picture"
        return png

    async def _job(self, request: gateway_pb2.GenerateRequest, first: int) -> bytes:
        """Submitted once, at whichever gateway answers; then asked for at either."""
        self.tally.jobs += 1
        submit = gateway_pb2.SubmitRequest(request=request)
        job = (await self._anywhere("Submit", submit, first)).job
        while job.state not in _ENDED:
            await asyncio.sleep(POLL)
            job = (await self._anywhere("Get", gateway_pb2.GetRequest(id=job.id), first)).job
        assert job.state == gateway_pb2.JOB_STATE_SUCCEEDED, f"job {job.reason}: {job.message}"
        return job.images[0].png

    async def _anywhere(self, method: str, message: object, first: int) -> Any:
        attempt = first
        while True:
            call = getattr(self._stubs[attempt % len(self._stubs)], method)
            try:
                return await call(message, timeout=10)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (*_ELSEWHERE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
            attempt += 1
            await asyncio.sleep(POLL)
