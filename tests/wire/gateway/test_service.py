# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The gateway's doors: gRPC with its errors, health and reflection, HTTP, metrics, ports in use."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager, contextmanager

import grpc
import grpc.aio
import httpx
import pytest
from gateways import assert_empty, changed, gateway_over, one_node, request
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kubediffusion import rpc
from kubediffusion.errors import InvalidInput, NotFound, Unavailable
from kubediffusion.gateway import server
from kubediffusion.gateway.server import Doors, serve
from kubediffusion.v1alpha1 import gateway_pb2, gateway_pb2_grpc, node_pb2


@asynccontextmanager
async def served(tmp_path, **more):
    node = one_node(tmp_path, **more)
    async with gateway_over([node]) as gateway:
        doors = Doors(
            grpc=f"unix:{tmp_path}/gateway.sock", http="127.0.0.1:0", metrics="127.0.0.1:0"
        )
        async with (
            serve(gateway, doors, drain_seconds=0.0) as addresses,
            rpc.connect(addresses.grpc) as channel,
        ):
            yield gateway, node, addresses, channel


async def test_a_client_generates_over_grpc(tmp_path):
    async with served(tmp_path) as (gateway, _, _, channel):
        stub = gateway_pb2_grpc.GatewayStub(channel)
        events = [event async for event in stub.Generate(request())]
        assert events[-1].WhichOneof("kind") == "finished"
        workflows = (await stub.ListWorkflows(gateway_pb2.ListWorkflowsRequest())).workflows
        assert [info.name for info in workflows] == ["sd3"]
        assert workflows[0].ready
        status = await stub.GetStatus(gateway_pb2.GetStatusRequest())
        assert status.gateway_id == gateway.config.gateway_id
        assert_empty(gateway)


async def test_an_error_keeps_its_class_reason_and_field(tmp_path):
    async with served(tmp_path) as (_, _, _, channel):
        stub = gateway_pb2_grpc.GatewayStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(request(steps=0)):
                pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        error = rpc.from_rpc_error(caught.value)
        assert isinstance(error, InvalidInput)
        assert error.field == "inputs.steps"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Get(gateway_pb2.GetRequest(id="nope"))
        assert isinstance(rpc.from_rpc_error(caught.value), NotFound)


async def test_a_connection_that_is_old_makes_way_for_another(tmp_path, monkeypatch):
    """Its clients would never see a second gateway else; a stream on it goes on to its end."""
    peers: list[str] = []

    async def status(self, message, context):
        peers.append(context.peer())
        return gateway_pb2.GetStatusResponse()

    monkeypatch.setattr(server.GatewayService, "GetStatus", status)
    go = asyncio.Event()
    node = one_node(tmp_path, script=lambda node, assign, step: go.wait() if step == 2 else None)
    doors = Doors(grpc="127.0.0.1:0", grpc_age=0.2)
    async with (
        gateway_over([node]) as gateway,
        serve(gateway, doors, drain_seconds=0.0) as addresses,
        rpc.connect(addresses.grpc) as channel,
    ):
        stub = gateway_pb2_grpc.GatewayStub(channel)
        stream = stub.Generate(request())
        async with asyncio.timeout(60):
            while len(set(peers)) < 2:
                await stub.GetStatus(gateway_pb2.GetStatusRequest())
        go.set()
        assert [event async for event in stream][-1].WhichOneof("kind") == "finished"


async def test_a_client_of_another_protocol_is_told(tmp_path):
    async with served(tmp_path) as (_, _, _, channel):
        stub = gateway_pb2_grpc.GatewayStub(channel)
        newer = request(protocol=node_pb2.ProtocolRange(min=7, max=9))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(newer):
                pass
        assert rpc.from_rpc_error(caught.value).field == "protocol"


async def test_a_client_that_leaves_cancels_its_request(tmp_path):
    never = asyncio.Event()

    def block(node, assign, step):
        return never.wait() if step == 2 else None

    async with served(tmp_path, script=block) as (gateway, node, _, channel):
        call = gateway_pb2_grpc.GatewayStub(channel).Generate(request())
        async for event in call:
            if event.WhichOneof("kind") == "stepped":
                break
        call.cancel()
        await node.until(lambda: bool(node.cancelled) and bool(node.released))
        assert_empty(gateway)


async def test_health_and_reflection_answer(tmp_path):
    async with served(tmp_path) as (_, _, _, channel):
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "kubediffusion.v1alpha1.Gateway"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = {s.name for s in (await call.read()).list_services_response.service}
        await call.done_writing()
        assert "kubediffusion.v1alpha1.Gateway" in names


async def test_http_and_metrics_answer_on_ports_of_their_own(tmp_path):
    async with served(tmp_path) as (gateway, _, addresses, channel):
        stub = gateway_pb2_grpc.GatewayStub(channel)
        async for _ in stub.Generate(request()):
            pass
        gateway.measures.refresh()
        async with httpx.AsyncClient(trust_env=False) as client:
            models = await client.get(f"http://{addresses.http}/v1/models")
            assert [model["id"] for model in models.json()["data"]] == ["sd3"]
            metrics = (await client.get(f"http://{addresses.metrics}/metrics")).text
        assert (
            'kubediffusion_gateway_requests_total{outcome="succeeded",workflow="sd3"} 1.0'
            in metrics
        )
        assert 'kubediffusion_gateway_workflow_ready{workflow="sd3"} 1.0' in metrics


@pytest.mark.parametrize("door", ["grpc", "http", "metrics"])
async def test_a_port_in_use_is_named_with_what_to_do(tmp_path, door):
    async with gateway_over([]) as gateway:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(Unavailable) as caught:
                async with serve(gateway, Doors(**{door: address})):
                    pass
        assert caught.value.reason == "PortInUse"
        assert address in str(caught.value)
        assert "choose another" in str(caught.value)


async def test_demand_is_shown_while_a_model_has_no_node(tmp_path):
    node = one_node(tmp_path)
    gone = next(identity for identity, kind in node.models.items() if kind == "dit")
    async with gateway_over([node]) as gateway:
        async for _ in gateway.generate(request()):
            pass  # facts are known from now on
        del node.models[gone]
        node.report()
        await changed(gateway, lambda: not gateway.list_workflows()[0].ready)
        events = gateway.generate(request())
        async for event in events:
            if event.WhichOneof("kind") == "queued" and event.queued.cold:
                break
        gateway.measures.refresh()
        value = gateway.measures.registry.get_sample_value(
            "kubediffusion_gateway_model_tasks",
            {"model": gone, "stage": "denoise", "state": "held"},
        )
        assert value == 1.0
        await events.aclose()
        gateway.measures.refresh()
        assert_empty(gateway)


async def test_a_request_for_models_never_seen_is_demand_for_each_of_them(tmp_path):
    async with gateway_over([]) as gateway:
        events = gateway.generate(request(n=2))
        assert (await anext(events)).queued.cold
        gateway.measures.refresh()
        for identity, kind in one_node(tmp_path).models.items():
            stage = {"text": "encode", "dit": "denoise", "vae": "decode"}[kind]
            value = gateway.measures.registry.get_sample_value(
                "kubediffusion_gateway_model_tasks",
                {"model": identity, "stage": stage, "state": "held"},
            )
            assert value == 2.0
        await events.aclose()
        assert_empty(gateway)


async def test_http_answers_are_counted_by_route_and_code(tmp_path):
    async with served(tmp_path) as (gateway, _, addresses, _):
        async with httpx.AsyncClient(base_url=f"http://{addresses.http}") as client:
            await client.get("/healthz")
            await client.get("/images/made-up")
            await client.get("/no/such/path")
        registry = gateway.measures.registry

        def count(route: str, code: str) -> float | None:
            labels = {"route": route, "code": code}
            return registry.get_sample_value("kubediffusion_gateway_http_requests_total", labels)

        assert count("/healthz", "200") == 1
        assert count("/images/{name}", "404") == 1
        assert count("unknown", "404") == 1
        name = "kubediffusion_gateway_http_request_seconds_count"
        assert registry.get_sample_value(name, {"route": "/healthz"}) == 1


class Recorded:
    """Tracing that keeps what it was asked for."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str]] = []

    @contextmanager
    def span(self, name: str, traceparent: str = "", **attributes: str | int | float | bool):
        self.spans.append((name, traceparent))
        yield OURS

    def close(self) -> None:
        self.spans.append(("closed", ""))


THEIRS = f"00-{'1' * 32}-{'2' * 16}-01"
OURS = f"00-{'1' * 32}-{'3' * 16}-01"


async def test_the_nodes_spans_lie_under_the_gateways_and_that_under_the_callers(
    tmp_path, monkeypatch
):
    traces = Recorded()
    monkeypatch.setattr(server, "configure_tracing", lambda service: traces)
    async with served(tmp_path) as (_, node, addresses, channel):
        stub = gateway_pb2_grpc.GatewayStub(channel)
        async for _ in stub.Generate(request(traceparent=THEIRS)):
            pass
        assert traces.spans == [("Generate", THEIRS)]
        async with httpx.AsyncClient(base_url=f"http://{addresses.http}") as client:
            body = {"model": "sd3", "prompt": "a fox", "size": "8x8"}
            headers = {"traceparent": THEIRS}
            answer = await client.post("/v1/images/generations", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert traces.spans[1] == ("HTTP POST", THEIRS)
        assert {assign.traceparent for assign in node.assigned} == {OURS}
    assert traces.spans[-1] == ("closed", "")
