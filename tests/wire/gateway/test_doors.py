# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Who gets in, when requests should come, and how the doors close."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from gateways import CONFIG, assert_empty, gateway_over, one_node, request
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kubediffusion import rpc
from kubediffusion.client import AsyncClient
from kubediffusion.errors import Unauthenticated, Unavailable
from kubediffusion.gateway.config import JobLimits
from kubediffusion.gateway.core import Gateway
from kubediffusion.gateway.readiness import Readiness
from kubediffusion.gateway.server import SERVICE, Addresses, Doors, serve
from kubediffusion.v1alpha1 import gateway_pb2, gateway_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SUCCEEDED = gateway_pb2.JOB_STATE_SUCCEEDED


@asynccontextmanager
async def served(
    tmp_path: Path, script: Any = None, **options: Any
) -> AsyncIterator[tuple[Gateway, Addresses, grpc.aio.Channel]]:
    more = {} if script is None else {"script": script}
    async with gateway_over([one_node(tmp_path, **more)]) as gateway:
        doors = Doors(grpc=f"unix:{tmp_path}/gateway.sock", http="127.0.0.1:0")
        async with (
            serve(gateway, doors, **{"drain_seconds": 0.0, **options}) as addresses,
            rpc.connect(addresses.grpc) as channel,
        ):
            yield gateway, addresses, channel


async def status(channel: grpc.aio.Channel, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


def get(address: str, path: str) -> Callable[[], Any]:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False) as http:
            return await http.get(f"http://{address}{path}")

    return ask


# ---------------------------------------------------------------- API keys

METHODS = [method.name for method in gateway_pb2.DESCRIPTOR.services_by_name["Gateway"].methods]


async def call(channel: grpc.aio.Channel, method: str, key: str = "") -> None:
    """Raises whatever the call ends with."""
    stub: Any = gateway_pb2_grpc.GatewayStub(channel)
    kind = getattr(gateway_pb2, f"{method}Request")
    message = request() if method == "Generate" else kind()
    metadata = (("authorization", key),) if key else ()
    answer = getattr(stub, method)(message, metadata=metadata)
    if method == "Generate":
        async for _ in answer:
            pass
    else:
        await answer


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", ["", "Bearer wrong", "Basic s3cret", "Bearer "])
async def test_every_grpc_method_wants_a_key(tmp_path: Path, method: str, key: str) -> None:
    async with served(tmp_path, api_keys=frozenset({"s3cret"})) as (gateway, _, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, method, key)
        error = rpc.from_rpc_error(caught.value)
        assert isinstance(error, Unauthenticated)
        assert error.reason == "InvalidApiKey"
        assert_empty(gateway)


async def test_with_a_key_the_client_gets_in_as_its_own_tenant(tmp_path: Path) -> None:
    keys = frozenset({"s3cret", "other"})
    async with served(tmp_path, api_keys=keys) as (_, addresses, _):
        async with AsyncClient(addresses.grpc, api_key="s3cret", tenant="somebody") as client:
            await client.image("sd3", prompt="a fox", steps=4)
            job = await client.submit("sd3", prompt="a fox", steps=4)
            assert job.tenant.startswith("key-")
            assert [each.id async for each in client.list()] == [job.id]
        async with AsyncClient(addresses.grpc, api_key="other", tenant=job.tenant) as client:
            assert [each.id async for each in client.list()] == []
        async with AsyncClient(addresses.grpc, api_key="guessed") as client:
            with pytest.raises(Unauthenticated):
                await client.status()


async def test_probes_need_no_key(tmp_path: Path) -> None:
    async with served(tmp_path, api_keys=frozenset({"s3cret"})) as (_, addresses, channel):
        assert await status(channel) == SERVING
        assert (await get(addresses.http, "/readyz")()).status_code == 200
        assert (await get(addresses.http, "/v1/models")()).status_code == 401
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = stub.ServerReflectionInfo()
        await asked.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert (await asked.read()).list_services_response.service


def test_a_key_is_not_shown_by_accident() -> None:
    assert "s3cret" not in repr(AsyncClient("here:1", api_key="s3cret")._options)


# ---------------------------------------------------------------- readiness


async def test_readiness_is_told_to_both_kinds_of_probes_and_liveness_is_another_thing(
    tmp_path: Path,
) -> None:
    readiness = Readiness("the workflows are not known yet")
    async with served(tmp_path, readiness=readiness) as (_, addresses, channel):
        refused = await get(addresses.http, "/readyz")()
        assert refused.status_code == 503
        assert "not known yet" in refused.text
        assert (await get(addresses.http, "/healthz")()).status_code == 200
        assert await status(channel) == await status(channel, SERVICE) == NOT_SERVING
        assert await status(channel, "liveness") == SERVING
        readiness.set("")
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        async with asyncio.timeout(60):
            async for answer in watch:
                if answer.status == SERVING:
                    break
        watch.cancel()
        assert (await get(addresses.http, "/readyz")()).status_code == 200


async def test_a_gateway_without_workflows_is_ready_where_its_owner_says_so(
    tmp_path: Path,
) -> None:
    async with served(tmp_path, readiness=Readiness()) as (gateway, addresses, _):
        gateway.set_workflows({})
        assert (await get(addresses.http, "/readyz")()).status_code == 200


async def test_keep_alive_connections_move_on_once_the_gateway_is_not_ready(
    tmp_path: Path,
) -> None:
    readiness = Readiness()
    async with served(tmp_path, readiness=readiness) as (_, addresses, _):
        answer = await get(addresses.http, "/v1/models")()
        assert "connection" not in answer.headers
        readiness.set("the gateway is shutting down")
        answer = await get(addresses.http, "/v1/models")()
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"


async def test_a_workflow_that_cannot_be_known_yet_is_no_unknown_one(tmp_path: Path) -> None:
    async with served(tmp_path) as (gateway, addresses, channel):
        gateway.set_workflows({})
        gateway.unsynced = "the cluster's workflows are not known yet"
        for method in ("Generate", "ListWorkflows"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(channel, method)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (await get(addresses.http, "/v1/models")()).status_code == 503
        gateway.measures.refresh()


# ---------------------------------------------------------------- closing


def held() -> tuple[asyncio.Event, asyncio.Event, Callable[..., Any]]:
    """A script of a node that waits in the middle of a request."""
    reached, go = asyncio.Event(), asyncio.Event()

    def script(node: Any, assign: Any, step: int) -> Any:
        if assign.stage == "denoise" and step == 2:
            reached.set()
            return go.wait()
        return None

    return reached, go, script


async def test_what_is_under_way_on_both_doors_ends_within_the_drain(tmp_path: Path) -> None:
    reached, go, script = held()
    body = {"model": "sd3", "prompt": "a fox", "seed": 7, "steps": 8}

    async def over_http(address: str) -> int:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
            answer = await http.post(f"http://{address}/v1/images/generations", json=body)
            return answer.status_code

    async def over_grpc(address: str) -> Any:
        async with AsyncClient(address, attempts=1) as client:
            return await client.image("sd3", prompt="a fox", seed=7, steps=8)

    async with gateway_over([one_node(tmp_path, script=script)]) as gateway:
        doors = Doors(grpc=f"unix:{tmp_path}/gateway.sock", http="127.0.0.1:0")
        serving = serve(gateway, doors, drain_seconds=60.0)
        addresses = await serving.__aenter__()
        under_way = [
            asyncio.create_task(over_http(addresses.http)),
            asyncio.create_task(over_grpc(addresses.grpc)),
        ]
        async with asyncio.timeout(60):
            await reached.wait()
            while len(gateway.flights) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        closing = asyncio.create_task(serving.__aexit__(None, None, None))
        async with asyncio.timeout(60):
            while True:  # nobody new gets in
                try:
                    await get(addresses.http, "/healthz")()
                except httpx.TransportError:
                    break
        go.set()
        status_code, image = await asyncio.gather(*under_way)
        assert (status_code, image.seed) == (200, 7)
        await closing
        assert_empty(gateway)


async def test_what_the_drain_does_not_suffice_for_is_told_to_go_elsewhere(tmp_path: Path) -> None:
    reached, _, script = held()
    async with gateway_over([one_node(tmp_path, script=script)]) as gateway:
        serving = serve(gateway, Doors(grpc=f"unix:{tmp_path}/gateway.sock"), drain_seconds=0.0)
        addresses = await serving.__aenter__()
        async with AsyncClient(addresses.grpc, attempts=1) as client:
            image = asyncio.create_task(client.image("sd3", prompt="a fox", seed=7, steps=8))
            async with asyncio.timeout(60):
                await reached.wait()
            await serving.__aexit__(None, None, None)
            with pytest.raises(Unavailable, match="shutting down; send the request again"):
                await image


async def test_a_client_whose_gateway_goes_gets_its_picture_from_the_next_one(
    tmp_path: Path,
) -> None:
    """At the same address, as behind a Service; the picture is the one that it would have been."""
    reached, go, script = held()
    node = one_node(tmp_path, script=script)
    address = f"unix:{tmp_path}/gateway.sock"
    async with gateway_over([node]) as first:
        serving = serve(first, Doors(grpc=address), drain_seconds=0.0)
        await serving.__aenter__()
        async with AsyncClient(address, attempts=20) as client:
            image = asyncio.create_task(client.image("sd3", prompt="a fox", seed=7, steps=8))
            async with asyncio.timeout(60):
                await reached.wait()
            await serving.__aexit__(None, None, None)
            go.set()
            second = Gateway(first.config)
            await second.start()
            second.set_workflows(first.workflows)
            second.set_nodes([node.address])
            async with serve(second, Doors(grpc=address)):
                retried = await image
                again = await client.image("sd3", prompt="a fox", seed=7, steps=8)
                assert retried.png == again.png
            await second.stop()


async def test_jobs_that_wait_are_left_to_the_next_gateway(tmp_path: Path) -> None:
    """They were not begun, so they have not failed."""
    reached, go, script = held()
    node = one_node(tmp_path, script=script)
    database = f"sqlite:///{tmp_path}/jobs.db"
    config = replace(CONFIG, job_database=database, jobs=JobLimits(running=1))
    async with gateway_over([node], config=config) as first:
        begun = await first.jobs.submit(request(idempotency_key="a"))
        async with asyncio.timeout(60):
            await reached.wait()
        waits = await first.jobs.submit(request(idempotency_key="b"))
        draining = asyncio.create_task(first.drain(60.0))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await first.jobs.submit(request(idempotency_key="c"))
        go.set()
        await draining
        other = replace(config, gateway_id="second")
        async with gateway_over([], first.workflows, other) as second:
            second.set_nodes([node.address])
            async with asyncio.timeout(60):
                while (await second.jobs.get(waits.id)).state != SUCCEEDED:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            ended = await second.jobs.get(begun.id)
            assert ended.state == SUCCEEDED
