# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import socket

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from kubediffusion.errors import Unavailable
from kubediffusion.telemetry.metrics import OperatorMetrics
from kubediffusion_operator.cluster import Cluster
from kubediffusion_operator.health import STALE_SECONDS, STUCK_SECONDS, Health, HealthServer
from kubediffusion_operator.kinds import WATCHED


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.registry = CollectorRegistry()
        self.cluster = Cluster(lambda namespace: None, now=lambda: self.now)
        self.health = Health(self.cluster, OperatorMetrics(self.registry), now=lambda: self.now)

    def watch(self) -> None:
        self.cluster.watch(None)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def world() -> World:
    return World()


def test_a_beating_loop_is_alive_and_a_silent_one_is_not(world: World) -> None:
    world.watch()
    world.now = STUCK_SECONDS - 1
    assert not world.health.problems
    world.now = STUCK_SECONDS + 1
    assert world.health.problems == [f"no heartbeat for {STUCK_SECONDS + 1:.0f} s"]
    age = world.registry.get_sample_value("kubediffusion_operator_heartbeat_age_seconds")
    assert age == STUCK_SECONDS + 1
    world.health.beat()
    assert not world.health.problems


def test_a_watch_may_be_down_for_a_while_and_not_for_ever(world: World) -> None:
    world.watch()
    world.cluster.watches["Pod"].trouble = "refused"
    for world.now in range(0, int(STALE_SECONDS), 5):
        world.health.beat()
        assert not world.health.problems
    gauge = "kubediffusion_operator_watch_trouble"
    assert world.registry.get_sample_value(gauge, {"kind": "Pod"}) == 1
    assert world.registry.get_sample_value(gauge, {"kind": "Service"}) == 0
    world.now = STALE_SECONDS + 1
    world.health.beat()
    (problem,) = world.health.problems
    assert problem == f"Pod not watched for {STALE_SECONDS + 1:.0f} s: refused"
    world.cluster.watches["Pod"].trouble = ""
    world.health.beat()
    assert not world.health.problems


def test_a_part_that_ended_needs_a_new_process(world: World) -> None:
    world.health.died("watch of Pod")
    assert world.health.problems == ["watch of Pod has ended"]


def test_it_is_ready_once_every_kind_was_listed(world: World) -> None:
    assert world.health.missing == ["everything"]
    world.watch()
    assert world.health.missing == [each.kind for each in WATCHED]
    for kind, watch in world.cluster.watches.items():
        if kind != "Pod":
            watch.synced.set()
    assert world.health.missing == ["Pod"]
    world.cluster.watches["Pod"].synced.set()
    assert world.health.missing == []


async def test_the_probes_answer_with_the_reasons(world: World) -> None:
    server = HealthServer(world.health)
    await server.start("127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.port}"
    try:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/healthz") as answer:
                assert (answer.status, await answer.text()) == (200, "ok\n")
            async with session.get(f"{url}/readyz") as answer:
                assert (answer.status, await answer.text()) == (503, "everything not listed yet\n")
            world.health.died("planning")
            async with session.get(f"{url}/healthz") as answer:
                assert (answer.status, await answer.text()) == (503, "planning has ended\n")
    finally:
        await server.stop()


async def test_a_port_in_use_is_said_so(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=f"{port}.*another") as info:
            await HealthServer(world.health).start("127.0.0.1", port)
        assert info.value.reason == "PortInUse"
    await asyncio.sleep(0)
