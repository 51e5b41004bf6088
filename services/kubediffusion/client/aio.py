# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from kubediffusion import rpc
from kubediffusion.client.core import (
    GenerateOptions,
    Generation,
    Options,
    Retry,
    build_request,
    only_image,
)
from kubediffusion.client.events import Event, Image
from kubediffusion.client.records import (
    Job,
    JobState,
    Status,
    Workflow,
    job_of,
    state_to_wire,
    status_of,
    workflow_of,
)
from kubediffusion.errors import DeadlineExceeded
from kubediffusion.v1alpha1 import gateway_pb2, gateway_pb2_grpc


class AsyncClient:
    """A gateway at "host:port" or "unix:/path". See `Client` for what the methods do.

    An ``async with`` or `close` ends it. It belongs to the event loop in which it is first used.
    """

    def __init__(
        self,
        address: str,
        *,
        tenant: str = "",
        attempts: int = 5,
        timeout: float = 30.0,
        api_key: str = "",
    ) -> None:
        self._options = Options(address, tenant, attempts, timeout, api_key)
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    # ------------------------------------------------------------ generating

    async def generate(
        self, workflow: str, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event, None]:
        """See `Client.generate`. Cancelling the task or closing the iterator cancels it."""
        request = build_request(workflow, self._options.tenant, **options)
        generation = Generation(request, self._options)
        while not generation.finished:
            message, timeout = generation.attempt()
            call = self._stub().Generate(message, timeout=timeout, metadata=self._options.metadata)
            try:
                async for each in call:
                    event = generation.accept(each)
                    if event is not None:
                        yield event
                generation.ended()
            except grpc.RpcError as error:
                pause = generation.pause_after(error)
            else:
                return
            finally:
                call.cancel()
            await asyncio.sleep(pause)

    async def images(self, workflow: str, **options: Unpack[GenerateOptions]) -> tuple[Image, ...]:
        events = self.generate(workflow, **options)
        async with aclosing(events):
            found = [event async for event in events if isinstance(event, Image)]
        return tuple(sorted(found, key=lambda image: image.index))

    async def image(self, workflow: str, **options: Unpack[GenerateOptions]) -> Image:
        return only_image(await self.images(workflow, **options))

    # ------------------------------------------------------------ jobs

    async def submit(self, workflow: str, **options: Unpack[GenerateOptions]) -> Job:
        generate = build_request(workflow, self._options.tenant, **options)
        request = gateway_pb2.SubmitRequest(request=generate)
        return job_of((await self._call(self._stub().Submit, request)).job)

    async def get(self, job_id: str) -> Job:
        request = gateway_pb2.GetRequest(id=job_id)
        return job_of((await self._call(self._stub().Get, request)).job)

    async def list(
        self, *, workflow: str = "", states: Collection[JobState] = (), page_size: int = 100
    ) -> AsyncIterator[Job]:
        token = ""
        while True:
            request = gateway_pb2.ListRequest(
                page_size=page_size,
                page_token=token,
                workflow=workflow,
                states=[state_to_wire(state) for state in states],
                tenant=self._options.tenant,
            )
            answer = await self._call(self._stub().List, request)
            for job in answer.jobs:
                yield job_of(job)
            token = answer.next_page_token
            if not token:
                return

    async def cancel(self, job_id: str) -> Job:
        request = gateway_pb2.CancelRequest(id=job_id)
        return job_of((await self._call(self._stub().Cancel, request)).job)

    async def wait(
        self,
        job_id: str,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 (as in Client)
        every: float = 0.5,
    ) -> Job:
        try:
            async with asyncio.timeout(timeout):
                while True:
                    job = await self.get(job_id)
                    if job.state.over:
                        return job
                    await asyncio.sleep(every)
        except TimeoutError:
            raise DeadlineExceeded(f"job {job_id} is not over after {timeout} seconds") from None

    # ------------------------------------------------------------ looking

    async def workflows(self) -> tuple[Workflow, ...]:
        request = gateway_pb2.ListWorkflowsRequest()
        answer = await self._call(self._stub().ListWorkflows, request)
        return tuple(workflow_of(info) for info in answer.workflows)

    async def status(self) -> Status:
        request = gateway_pb2.GetStatusRequest()
        return status_of(await self._call(self._stub().GetStatus, request))

    # ------------------------------------------------------------ inside

    def _stub(self) -> Any:
        if self._channel is None:
            self._channel = rpc.connect(self._options.address)
        return gateway_pb2_grpc.GatewayStub(self._channel)

    async def _call(self, method: Callable[..., Awaitable[Any]], request: object) -> Any:
        retry = Retry(self._options)
        while True:
            try:
                return await method(
                    request, timeout=self._options.timeout, metadata=self._options.metadata
                )
            except grpc.RpcError as error:
                pause = retry.pause_after(error)
            await asyncio.sleep(pause)
