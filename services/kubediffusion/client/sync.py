# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The client for plain code: on grpc's own blocking calls, so that no thread or loop is hidden."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing
from typing import Any, Self, Unpack

import grpc

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


class Client:
    """A gateway at "host:port" or "unix:/path".

    Its errors are those of `kubediffusion.errors`. A gateway that cannot be reached is tried
    `attempts` times; `timeout` is each call's in seconds, generations excepted, which have their
    `deadline`. A gateway with API keys wants one of them as `api_key`. A ``with`` or `close` ends
    the client. Threads may share it.
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
        self._channel = grpc.insecure_channel(address, options=rpc.CHANNEL_OPTIONS)
        self._stub: Any = gateway_pb2_grpc.GatewayStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    # ------------------------------------------------------------ generating

    def generate(
        self, workflow: str, **options: Unpack[GenerateOptions]
    ) -> Generator[Event, None, None]:
        """Generates, and yields what happens: Queued, Started, Stepped, Preview, Image, Finished.

        Closing the iterator cancels the request. Where the connection is lost, the request goes on
        by its idempotency key, and no event comes twice.
        """
        request = build_request(workflow, self._options.tenant, **options)
        generation = Generation(request, self._options)
        while not generation.finished:
            message, timeout = generation.attempt()
            call = self._stub.Generate(message, timeout=timeout, metadata=self._options.metadata)
            try:
                for each in call:
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
            time.sleep(pause)

    def images(self, workflow: str, **options: Unpack[GenerateOptions]) -> tuple[Image, ...]:
        """The finished pictures, all n of them, in the order of their seeds."""
        with closing(self.generate(workflow, **options)) as events:
            found = [event for event in events if isinstance(event, Image)]
        return tuple(sorted(found, key=lambda image: image.index))

    def image(self, workflow: str, **options: Unpack[GenerateOptions]) -> Image:
        """The one finished picture."""
        return only_image(self.images(workflow, **options))

    # ------------------------------------------------------------ jobs

    def submit(self, workflow: str, **options: Unpack[GenerateOptions]) -> Job:
        """The same as `generate`, as a job that goes on without this client."""
        generate = build_request(workflow, self._options.tenant, **options)
        request = gateway_pb2.SubmitRequest(request=generate)
        return job_of(self._call(self._stub.Submit, request).job)

    def get(self, job_id: str) -> Job:
        """With its images, if it is over. Raises NotFound."""
        return job_of(self._call(self._stub.Get, gateway_pb2.GetRequest(id=job_id)).job)

    def list(
        self, *, workflow: str = "", states: Collection[JobState] = (), page_size: int = 100
    ) -> Iterator[Job]:
        """Jobs without their images, page by page as they are asked for."""
        token = ""
        while True:
            request = gateway_pb2.ListRequest(
                page_size=page_size,
                page_token=token,
                workflow=workflow,
                states=[state_to_wire(state) for state in states],
                tenant=self._options.tenant,
            )
            answer = self._call(self._stub.List, request)
            for job in answer.jobs:
                yield job_of(job)
            token = answer.next_page_token
            if not token:
                return

    def cancel(self, job_id: str) -> Job:
        return job_of(self._call(self._stub.Cancel, gateway_pb2.CancelRequest(id=job_id)).job)

    def wait(self, job_id: str, *, timeout: float | None = None, every: float = 0.5) -> Job:
        """The job once it is over, however it ended. Raises DeadlineExceeded after `timeout`."""
        ends = time.monotonic() + timeout if timeout is not None else None
        while not (job := self.get(job_id)).state.over:
            if ends is not None and time.monotonic() + every > ends:
                raise DeadlineExceeded(f"job {job_id} is not over after {timeout} seconds")
            time.sleep(every)
        return job

    # ------------------------------------------------------------ looking

    def workflows(self) -> tuple[Workflow, ...]:
        answer = self._call(self._stub.ListWorkflows, gateway_pb2.ListWorkflowsRequest())
        return tuple(workflow_of(info) for info in answer.workflows)

    def status(self) -> Status:
        return status_of(self._call(self._stub.GetStatus, gateway_pb2.GetStatusRequest()))

    # ------------------------------------------------------------ inside

    def _call(self, method: Callable[..., Any], request: object) -> Any:
        retry = Retry(self._options)
        while True:
            try:
                return method(
                    request, timeout=self._options.timeout, metadata=self._options.metadata
                )
            except grpc.RpcError as error:
                pause = retry.pause_after(error)
            time.sleep(pause)
