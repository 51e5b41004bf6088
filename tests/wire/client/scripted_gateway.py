# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A gateway that plays what a test wrote down, over real gRPC."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from PIL import Image

from kubediffusion import errors, rpc
from kubediffusion.v1alpha1 import gateway_pb2, gateway_pb2_grpc

# Events to send, errors to fail with, and WAIT to stay until the client leaves.
WAIT = object()
Play = list[object]


def png(color: str, size: tuple[int, int] = (4, 3)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def event(index: int = 0, **kind: object) -> gateway_pb2.GenerateEvent:
    return gateway_pb2.GenerateEvent(request_id="r", index=index, **kind)  # type: ignore[arg-type]


def stepped(step: int, index: int = 0) -> gateway_pb2.GenerateEvent:
    return event(index, stepped=gateway_pb2.Stepped(step=step, total_steps=4))


def image(index: int = 0, color: str = "red", seed: int = 7) -> gateway_pb2.GenerateEvent:
    picture = gateway_pb2.Image(png=png(color), width=4, height=3, seed=seed)
    return event(index, image=picture)


def finished() -> gateway_pb2.GenerateEvent:
    return event(finished=gateway_pb2.Finished(seconds=1.5))


class FakeGateway(gateway_pb2_grpc.GatewayServicer):
    def __init__(self) -> None:
        self.plays: list[Play] = []
        self.requests: list[gateway_pb2.GenerateRequest] = []
        self.asked = asyncio.Event()
        self.left = asyncio.Event()
        self.jobs: dict[str, gateway_pb2.Job] = {}
        self.on_get: Callable[[gateway_pb2.Job], None] = lambda job: None
        self.calls: list[object] = []
        self.failures: list[errors.KubeDiffusionError] = []
        self.workflows: list[gateway_pb2.WorkflowInfo] = []
        self.status = gateway_pb2.GetStatusResponse()

    async def Generate(
        self, request: gateway_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[gateway_pb2.GenerateEvent]:
        self.requests.append(request)
        self.asked.set()
        async with rpc.answering(context):
            try:
                for act in self.plays.pop(0):
                    if isinstance(act, Exception):
                        raise act
                    if act is WAIT:
                        await asyncio.Event().wait()
                    else:
                        yield act  # type: ignore[misc]
            except (asyncio.CancelledError, GeneratorExit):
                self.left.set()
                raise

    async def _answer(self, request: object, context: grpc.aio.ServicerContext) -> None:
        self.calls.append(request)
        async with rpc.answering(context):
            if self.failures:
                raise self.failures.pop(0)

    async def _job(self, job_id: str, context: grpc.aio.ServicerContext) -> gateway_pb2.Job:
        async with rpc.answering(context):
            if job_id not in self.jobs:
                raise errors.NotFound(f"no job {job_id}", field="id")
        return self.jobs[job_id]

    async def Submit(self, request, context):
        await self._answer(request, context)
        job = gateway_pb2.Job(
            id="job-1", workflow=request.request.workflow, state="JOB_STATE_QUEUED"
        )
        self.jobs[job.id] = job
        return gateway_pb2.SubmitResponse(job=job)

    async def Get(self, request, context):
        await self._answer(request, context)
        job = await self._job(request.id, context)
        self.on_get(job)
        return gateway_pb2.GetResponse(job=job)

    async def List(self, request, context):
        await self._answer(request, context)
        start = int(request.page_token or 0)
        jobs = list(self.jobs.values())
        end = start + request.page_size
        token = str(end) if end < len(jobs) else ""
        return gateway_pb2.ListResponse(jobs=jobs[start:end], next_page_token=token)

    async def Cancel(self, request, context):
        await self._answer(request, context)
        job = await self._job(request.id, context)
        job.state = gateway_pb2.JOB_STATE_CANCELLED
        return gateway_pb2.CancelResponse(job=job)

    async def ListWorkflows(self, request, context):
        await self._answer(request, context)
        return gateway_pb2.ListWorkflowsResponse(workflows=self.workflows)

    async def GetStatus(self, request, context):
        await self._answer(request, context)
        return self.status


@asynccontextmanager
async def serving(gateway: FakeGateway, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
    gateway_pb2_grpc.add_GatewayServicer_to_server(gateway, server)
    bound = rpc.bind(server, address)
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(0)
