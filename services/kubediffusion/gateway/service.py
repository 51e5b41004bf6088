# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The gateway over gRPC. Errors leave as a status with kd-reason and kd-field (see `rpc`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from kubediffusion import rpc
from kubediffusion.errors import InvalidInput
from kubediffusion.gateway.connections import PROTOCOL
from kubediffusion.gateway.core import Gateway
from kubediffusion.gateway.keys import ApiKeys
from kubediffusion.telemetry.tracing import Tracing
from kubediffusion.v1alpha1 import gateway_pb2, gateway_pb2_grpc

Context = grpc.aio.ServicerContext


class GatewayService(gateway_pb2_grpc.GatewayServicer):
    def __init__(self, gateway: Gateway, tracing: Tracing, keys: ApiKeys | None = None) -> None:
        """With `keys`, callers must bring one in the metadata ``authorization``."""
        self._gateway = gateway
        self._tracing = tracing
        self._keys = keys

    @asynccontextmanager
    async def _answering(self, context: Context, request: Any = None) -> AsyncIterator[None]:
        """Around every method: who may call, as which tenant, and errors as a status."""
        async with rpc.answering(context):
            tenant = self._tenant(context)
            if tenant is not None and request is not None:
                request.tenant = tenant
            yield

    def _tenant(self, context: Context) -> str | None:
        """Whose the caller's key is; None where no key is asked for. Raises Unauthenticated."""
        return None if self._keys is None else self._keys.tenant(_authorization(context))

    async def Generate(self, request: gateway_pb2.GenerateRequest, context: Context) -> None:
        """A client that leaves cancels this handler, and so closes the events and the request."""
        async with self._answering(context, request):
            _check_protocol(request)
            with self._tracing.span(
                "Generate", request.traceparent, workflow=request.workflow
            ) as traceparent:
                request.traceparent = traceparent  # the nodes' spans lie under ours
                events = self._gateway.generate(request)
                try:
                    async for event in events:
                        await context.write(event)
                finally:
                    await events.aclose()

    async def Submit(
        self, request: gateway_pb2.SubmitRequest, context: Context
    ) -> gateway_pb2.SubmitResponse:
        async with self._answering(context, request.request):
            _check_protocol(request.request)
            return gateway_pb2.SubmitResponse(job=await self._gateway.jobs.submit(request.request))
        raise AssertionError("aborted")

    async def Get(
        self, request: gateway_pb2.GetRequest, context: Context
    ) -> gateway_pb2.GetResponse:
        async with self._answering(context):
            job = await self._gateway.jobs.get(request.id, self._tenant(context))
            return gateway_pb2.GetResponse(job=job)
        raise AssertionError("aborted")

    async def List(
        self, request: gateway_pb2.ListRequest, context: Context
    ) -> gateway_pb2.ListResponse:
        async with self._answering(context, request):
            return await self._gateway.jobs.list(request)
        raise AssertionError("aborted")

    async def Cancel(
        self, request: gateway_pb2.CancelRequest, context: Context
    ) -> gateway_pb2.CancelResponse:
        async with self._answering(context):
            job = await self._gateway.jobs.cancel(request.id, self._tenant(context))
            return gateway_pb2.CancelResponse(job=job)
        raise AssertionError("aborted")

    async def ListWorkflows(
        self, request: gateway_pb2.ListWorkflowsRequest, context: Context
    ) -> gateway_pb2.ListWorkflowsResponse:
        async with self._answering(context):
            workflows = self._gateway.list_workflows()
            return gateway_pb2.ListWorkflowsResponse(workflows=workflows)
        raise AssertionError("aborted")

    async def GetStatus(
        self, request: gateway_pb2.GetStatusRequest, context: Context
    ) -> gateway_pb2.GetStatusResponse:
        async with self._answering(context):
            return self._gateway.status()
        raise AssertionError("aborted")


def _authorization(context: Context) -> str:
    for name, value in context.invocation_metadata() or ():
        if name == "authorization" and isinstance(value, str):
            return value
    return ""


def _check_protocol(request: gateway_pb2.GenerateRequest) -> None:
    if not request.HasField("protocol"):
        return
    wanted = request.protocol
    if wanted.min > PROTOCOL.max or wanted.max < PROTOCOL.min:
        raise InvalidInput(
            f"the client speaks protocol {wanted.min} to {wanted.max}, this gateway "
            f"{PROTOCOL.min} to {PROTOCOL.max}; update the older one of the two",
            field="protocol",
        )
