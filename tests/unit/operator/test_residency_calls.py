# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Against a real gRPC server that answers as a node does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from kubediffusion import rpc
from kubediffusion.telemetry.metrics import OperatorMetrics
from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc
from kubediffusion_operator import residency as module
from kubediffusion_operator.planning.types import ResidencyReport, ResidencyWrite
from kubediffusion_operator.residency import Residency


class Node(node_pb2_grpc.ModelNodeServicer):
    def __init__(self) -> None:
        self.requests: list[node_pb2.SetResidencyRequest] = []
        self.arrived = asyncio.Event()
        self.gate: asyncio.Event | None = None
        self.state = node_pb2.MODEL_STATE_READY
        self.refuse = False
        self.needed_by = 0

    async def SetResidency(self, request: Any, context: Any) -> node_pb2.SetResidencyResponse:
        self.requests.append(request)
        self.arrived.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.refuse:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "generation 1 is older than 7")
        status = node_pb2.ModelStatus(
            identity="vae-1", state=self.state, nbytes=5, digest="d", reason="R", message="why"
        )
        status.needed_by = self.needed_by
        return node_pb2.SetResidencyResponse(generation=request.generation, models=[status])

    async def Describe(self, request: Any, context: Any) -> node_pb2.DescribeResponse:
        return node_pb2.DescribeResponse(residency_generation=7, memory_limit=1000)


class World:
    def __init__(self, node: Node, address: str) -> None:
        self.node, self.address = node, address
        self.marks: asyncio.Queue[str] = asyncio.Queue()
        self.now = 0.0
        metrics = OperatorMetrics(CollectorRegistry())
        self.residency = Residency(
            self.marks.put_nowait, metrics, now=lambda: self.now, jitter=lambda: 1.0
        )

    def write(self, generation: int = 1, **changes: Any) -> ResidencyWrite:
        content = {"generation": str(generation), "planner": "operator", "models": []}
        values = {"pod": "p", "uid": "u", "restarts": 0, "address": self.address}
        return ResidencyWrite(**{**values, "content": content, **changes})

    async def report(self) -> ResidencyReport:
        assert await asyncio.wait_for(self.marks.get(), 30) == "ns"
        return self.residency.reports("ns")["u"]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    node = Node()
    server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
    node_pb2_grpc.add_ModelNodeServicer_to_server(node, server)
    address = rpc.bind(server, "127.0.0.1:0")
    await server.start()
    world = World(node, address)
    yield world
    await world.residency.stop()
    await server.stop(None)


async def test_a_plan_is_sent_and_its_answer_kept(world: World) -> None:
    content = {
        "generation": "3",
        "planner": "operator",
        "models": [{"identity": "vae-1", "family": "sd3"}],
    }
    world.residency.send("ns", [world.write(content=content)])
    report = await world.report()
    assert (report.generation, report.restarts, report.error) == (3, 0, "")
    (model,) = report.models
    assert (model.identity, model.state, model.digest) == ("vae-1", "READY", "d")
    assert report.memory_limit == 1000
    (request,) = world.node.requests
    assert (request.planner, request.models[0].identity) == ("operator", "vae-1")


async def test_what_gateways_need_is_news(world: World) -> None:
    content = {"generation": "1", "planner": "operator", "models": []}
    world.residency.send("ns", [world.write(content=content)])
    assert not (await world.report()).models[0].needed
    world.node.needed_by = 2
    world.now += module.POLL_SECONDS
    world.residency.send("ns", [world.write(content=content)])
    assert (await world.report()).models[0].needed


async def test_the_same_plan_is_not_sent_twice_at_once_and_a_newer_one_follows(
    world: World,
) -> None:
    world.node.gate = asyncio.Event()
    world.residency.send("ns", [world.write(1)])
    await world.node.arrived.wait()
    world.residency.send("ns", [world.write(1)])
    world.residency.send("ns", [world.write(2)])
    world.node.gate.set()
    while (await world.report()).generation != 2:
        pass
    assert [request.generation for request in world.node.requests] == [1, 2]


async def test_a_repeated_plan_waits_and_an_unchanged_answer_is_no_news(world: World) -> None:
    world.node.state = node_pb2.MODEL_STATE_LOADING
    world.residency.send("ns", [world.write()])
    assert (await world.report()).models[0].state == "LOADING"
    world.residency.send("ns", [world.write()])
    assert len(world.node.requests) == 1
    # It is told when it is time to look again.
    await world.report()
    world.now += module.POLL_SECONDS
    world.node.state = node_pb2.MODEL_STATE_READY
    world.residency.send("ns", [world.write()])
    assert (await world.report()).models[0].state == "READY"


async def test_a_refusal_tells_the_nodes_own_generation(world: World) -> None:
    world.node.refuse = True
    world.residency.send("ns", [world.write(1)])
    report = await world.report()
    assert (report.generation, report.models) == (7, ())
    assert "older than 7" in report.error


async def test_a_pod_that_does_not_listen_yet_is_an_error_that_passes(world: World) -> None:
    nowhere = world.write(address="127.0.0.1:1")
    world.residency.send("ns", [nowhere])
    report = await world.report()
    assert report.error
    assert report.generation == 0
    # A restart is another pod to us: it is asked at once.
    world.residency.send("ns", [world.write(restarts=1)])
    assert (await world.report()).restarts == 1


async def test_a_plan_that_is_none_is_said_so(world: World) -> None:
    world.residency.send("ns", [world.write(content={"nonsense": 1})])
    assert "nonsense" in (await world.report()).error
    assert not world.node.requests


async def test_pods_that_are_gone_are_forgotten(world: World) -> None:
    world.residency.send("ns", [world.write()])
    await world.report()
    world.residency.keep_only("elsewhere", [])
    assert "u" in world.residency.reports("ns")
    world.residency.keep_only("ns", [])
    assert world.residency.reports("ns") == {}


async def test_a_state_that_only_a_newer_node_knows_is_no_error(world: World) -> None:
    world.node.state = 99  # pyright: ignore[reportAttributeAccessIssue]
    world.residency.send("ns", [world.write()])
    report = await world.report()
    assert (report.error, report.models[0].state) == ("", "UNSPECIFIED")
    world.node.state = node_pb2.MODEL_STATE_READY
    world.now += module.POLL_SECONDS
    world.residency.send("ns", [world.write()])
    assert (await world.report()).models[0].state == "READY"


async def test_a_pod_whose_answer_nobody_foresaw_is_asked_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unforeseen(*_: object) -> ResidencyReport:
        raise KeyError("unforeseen")

    with monkeypatch.context() as patched:
        patched.setattr(module, "_report", unforeseen)
        world.residency.send("ns", [world.write()])
        assert "KeyError" in (await world.report()).error
    world.now += module.PAUSE_FIRST
    world.residency.send("ns", [world.write()])
    assert (await world.report()).error == ""
