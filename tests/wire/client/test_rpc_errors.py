# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Errors cross a real gRPC call and come out as they went in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from kubediffusion import errors, rpc
from kubediffusion.v1alpha1 import gateway_pb2, gateway_pb2_grpc

Handler = Callable[[], Awaitable[None]]


class OneHandler(gateway_pb2_grpc.GatewayServicer):
    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    async def ListWorkflows(self, request, context):
        async with rpc.answering(context):
            await self.handler()
        return gateway_pb2.ListWorkflowsResponse()


@asynccontextmanager
async def calling(handler: Handler) -> AsyncIterator[Callable[[], Awaitable[object]]]:
    server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
    gateway_pb2_grpc.add_GatewayServicer_to_server(OneHandler(handler), server)
    address = rpc.bind(server, "127.0.0.1:0")
    await server.start()
    try:
        async with rpc.connect(address) as channel:
            stub = gateway_pb2_grpc.GatewayStub(channel)
            yield lambda: stub.ListWorkflows(gateway_pb2.ListWorkflowsRequest(), timeout=60)
    finally:
        await server.stop(0)


def raising(error: BaseException) -> Handler:
    async def handler() -> None:
        raise error

    return handler


async def caught(error: BaseException) -> errors.KubeDiffusionError:
    async with calling(raising(error)) as call:
        with pytest.raises(grpc.aio.AioRpcError) as info:
            await call()
        return rpc.from_rpc_error(info.value)


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidInput("must be a multiple of 16, not 33", field="inputs.width"),
        errors.InvalidWorkflow("no such preset", field="spec.pipeline.preset", reason="NoPreset"),
        errors.UnsupportedModel("pickle"),
        errors.NotFound("no workflow 'été'; there are: sd3", field="workflow"),
        errors.Unauthenticated("no key"),
        errors.Conflict("that key was used for another request", field="idempotency_key"),
        errors.Overloaded("12 wait already", retry_after=2.5),
        errors.DeadlineExceeded("no time left"),
        errors.Cancelled("left"),
        errors.Unavailable("no node", reason="NoReplica"),
        errors.SourceUnavailable("hub down"),
        errors.TensorLost("gone", tensor_ids=("n/r/a/latents/1", "n/r/ö/b/1")),
        errors.Internal("bug"),
        errors.InvalidInput("naïve – ungültig", field="inputs.größe"),
    ],
    ids=lambda error: f"{type(error).__name__}-{error.field or error.reason}",
)
async def test_an_error_comes_out_as_it_went_in(error: errors.KubeDiffusionError) -> None:
    back = await caught(error)
    assert type(back) is type(error)
    assert back.reason == error.reason
    assert {**vars(back), "reason": ""} == {**vars(error), "reason": ""}
    assert str(back) == str(error)


async def test_a_bug_is_internal_and_its_text_stays_on_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    back = await caught(ZeroDivisionError("secret path"))
    assert isinstance(back, errors.Internal)
    assert "secret path" not in str(back)
    assert "secret path" in caplog.text


async def test_a_very_long_message_is_cut_and_still_arrives() -> None:
    back = await caught(errors.InvalidInput("x" * 100_000, field="f" * 100_000))
    assert isinstance(back, errors.InvalidInput)
    assert len(back.message) == rpc.MAX_STATUS_CHARS


async def test_a_cancelled_inner_task_ends_the_call_instead_of_leaving_it_hanging() -> None:
    assert isinstance(await caught(asyncio.CancelledError()), errors.Cancelled)


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    async with rpc.connect("127.0.0.1:1") as channel:
        stub = gateway_pb2_grpc.GatewayStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as info:
            await stub.ListWorkflows(gateway_pb2.ListWorkflowsRequest(), timeout=60)
    back = rpc.from_rpc_error(info.value, peer="127.0.0.1:1")
    assert isinstance(back, errors.Unavailable)
    assert "127.0.0.1:1" in str(back)


async def test_a_port_in_use_is_said_so() -> None:
    first, second = (grpc.aio.server(options=rpc.SERVER_OPTIONS) for _ in range(2))
    address = rpc.bind(first, "127.0.0.1:0")
    with pytest.raises(errors.Unavailable, match=address) as info:
        rpc.bind(second, address)
    assert info.value.reason == "PortInUse"
    await first.stop(0)
    await second.stop(0)


def test_a_status_without_our_metadata_maps_by_its_code() -> None:
    def of(code: grpc.StatusCode, details: str = "d") -> errors.KubeDiffusionError:
        metadata = grpc.aio.Metadata()
        return rpc.from_rpc_error(grpc.aio.AioRpcError(code, metadata, metadata, details))

    assert type(of(grpc.StatusCode.PERMISSION_DENIED)) is errors.Unauthenticated
    assert type(of(grpc.StatusCode.RESOURCE_EXHAUSTED)) is errors.Overloaded
    assert of(grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max").reason == "MessageTooLarge"
    assert type(of(grpc.StatusCode.UNIMPLEMENTED)) is errors.Internal
    assert type(of(grpc.StatusCode.DEADLINE_EXCEEDED)) is errors.DeadlineExceeded
