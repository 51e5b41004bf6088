# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Real node processes under a policy: leases that give way, and gateways that share nodes."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from real_nodes import RealNode, three_stages

from kubediffusion.gateway.config import GatewayConfig
from kubediffusion.gateway.core import Gateway
from kubediffusion.tensors import encode_value
from kubediffusion.v1alpha1 import gateway_pb2

STEP = 0.05


def request(seed: int, steps: int, deadline_ms: int | None = None) -> gateway_pb2.GenerateRequest:
    inputs = {"prompt": f"number {seed}", "steps": steps, "seed": seed}
    return gateway_pb2.GenerateRequest(
        workflow="standin",
        inputs={k: encode_value(v) for k, v in inputs.items()},
        deadline_ms=deadline_ms,
    )


@asynccontextmanager
async def gateways(tmp_path, names: str, count: int = 1):
    resolved = three_stages(STEP)
    nodes = [RealNode(tmp_path, name, resolved.models) for name in names]
    serving = [
        Gateway(GatewayConfig(policy="kubediffusion", checkpoint_every=10)) for _ in range(count)
    ]
    try:
        for node in nodes:
            await node.start()
        for gateway in serving:
            await gateway.start()
            gateway.set_workflows({"standin": resolved})
            gateway.set_nodes([node.address for node in nodes])
        yield serving
    finally:
        for gateway in serving:
            await gateway.stop()
        for node in nodes:
            await node.stop()


async def generate(gateway: Gateway, message, on_event=None):
    png, resumed = b"", list[gateway_pb2.Resumed]()
    async with asyncio.timeout(240):
        async for event in gateway.generate(message):
            kind = event.WhichOneof("kind")
            if kind == "image":
                png = event.image.png
            elif kind == "resumed":
                resumed.append(event.resumed)
            if on_event is not None:
                on_event(kind, event)
    return png, resumed


async def test_a_long_lease_gives_way_again_and_again_and_its_picture_is_the_same(tmp_path):
    async with gateways(tmp_path, "a") as (gateway,):
        before, _ = await generate(gateway, request(1, 80))
        stepping = asyncio.Event()
        long = asyncio.create_task(
            generate(gateway, request(1, 80), lambda kind, _: kind == "stepped" and stepping.set())
        )
        await asyncio.wait_for(stepping.wait(), 120)
        for seed in (2, 3, 4):
            # Its own work is 0.6 s, and the lease would keep the node for seconds.
            png, _ = await generate(gateway, request(seed, 10, deadline_ms=2500))
            assert png
        after, resumed = await long
        assert after == before
        reasons = [each.reason for each in resumed]
        assert reasons == ["Revoked"] * len(resumed)
        assert resumed
        steps = [each.from_step for each in resumed]
        assert steps == sorted(steps)
        assert not any(gateway.debug_counts()[name] for name in ("led", "works", "assigned"))


async def test_two_gateways_share_nodes_and_every_picture_is_right(tmp_path):
    async with gateways(tmp_path, "ab", count=2) as (first, second):
        alone = [(await generate(first, request(seed, 4)))[0] for seed in range(6)]
        answers = await asyncio.gather(
            *(
                generate(gateway, request(seed, 4))
                for seed in range(6)
                for gateway in (first, second)
            )
        )
        assert [png for png, _ in answers] == [png for png in alone for _ in range(2)]
        for gateway in (first, second):
            assert not any(gateway.debug_counts()[name] for name in ("led", "works", "assigned"))
