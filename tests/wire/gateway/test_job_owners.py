# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A job is its tenant's own: no other API key may see it or end it."""

from __future__ import annotations

import asyncio

import pytest
from gateways import gateway_over, one_node, request

from kubediffusion import rpc
from kubediffusion.errors import NotFound
from kubediffusion.gateway.server import Doors, serve
from kubediffusion.v1alpha1 import gateway_pb2, gateway_pb2_grpc


async def test_the_jobs_of_others_are_not_found(tmp_path):
    never = asyncio.Event()
    node = one_node(tmp_path, script=lambda node, assign, step: never.wait() if step == 1 else None)
    door = f"unix:{tmp_path}/gateway.sock"
    keys = frozenset({"ours", "theirs"})
    async with (
        gateway_over([node]) as gateway,
        serve(gateway, Doors(grpc=door), api_keys=keys, drain_seconds=0.0),
        rpc.connect(door) as channel,
    ):
        stub = gateway_pb2_grpc.GatewayStub(channel)
        ours, theirs = ((("authorization", f"Bearer {key}"),) for key in ("ours", "theirs"))
        submit = gateway_pb2.SubmitRequest(request=request())
        job = (await stub.Submit(submit, metadata=ours)).job
        for call in (
            stub.Get(gateway_pb2.GetRequest(id=job.id), metadata=theirs),
            stub.Cancel(gateway_pb2.CancelRequest(id=job.id), metadata=theirs),
        ):
            with pytest.raises(Exception) as caught:  # noqa: PT011
                await call
            assert isinstance(rpc.from_rpc_error(caught.value), NotFound)
            assert "there is no job" in str(rpc.from_rpc_error(caught.value))
        got = (await stub.Get(gateway_pb2.GetRequest(id=job.id), metadata=ours)).job
        assert got.state == gateway_pb2.JOB_STATE_RUNNING
        ended = (await stub.Cancel(gateway_pb2.CancelRequest(id=job.id), metadata=ours)).job
        assert ended.state == gateway_pb2.JOB_STATE_CANCELLED
