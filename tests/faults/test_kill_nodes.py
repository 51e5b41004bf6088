# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""kill -9 of real node processes in the midst of generations."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager

import pytest
from real_nodes import RealNode, three_stages

from kubediffusion.gateway.config import GatewayConfig
from kubediffusion.gateway.core import Gateway
from kubediffusion.tensors import encode_value
from kubediffusion.v1alpha1 import gateway_pb2

STEPS = 20
EVERY = 4
GENERATIONS = 8


def request(seed: int) -> gateway_pb2.GenerateRequest:
    inputs = {"prompt": f"number {seed}", "steps": STEPS, "seed": seed}
    return gateway_pb2.GenerateRequest(
        workflow="standin", inputs={k: encode_value(v) for k, v in inputs.items()}
    )


both = pytest.mark.parametrize("policy", ["queue", "kubediffusion"])


@asynccontextmanager
async def service(tmp_path, names: str, step_seconds: float, policy: str):
    resolved = three_stages(step_seconds)
    nodes = [RealNode(tmp_path, name, resolved.models) for name in names]
    gateway = Gateway(GatewayConfig(checkpoint_every=EVERY, policy=policy))
    try:
        for node in nodes:
            await node.start()
        await gateway.start()
        gateway.set_workflows({"standin": resolved})
        gateway.set_nodes([node.address for node in nodes])
        yield gateway, nodes
    finally:
        await gateway.stop()
        for node in nodes:
            await node.stop()


async def generate(gateway: Gateway, seed: int, on_event=None):
    """The picture, and how many steps ran more than once."""
    png, highest, repeated = b"", 0, 0
    events = gateway.generate(request(seed))
    async with asyncio.timeout(240):
        async for event in events:
            kind = event.WhichOneof("kind")
            if kind == "image":
                png = event.image.png
            elif kind == "stepped":
                highest = max(highest, event.stepped.step)
            elif kind == "resumed" and event.resumed.stage == "denoise":
                repeated += highest - event.resumed.from_step
            if on_event is not None:
                await on_event(kind, event)
    return png, repeated


@both
async def test_every_generation_survives_the_death_of_a_node_and_gives_the_same_picture(
    tmp_path, policy
):
    """A node dies at a random point of each of 8 generations, and comes back a little later."""
    draw = random.Random(11)
    # Steps that several reports of progress fit into, which come ten times a second.
    async with service(tmp_path, "abc", 0.03, policy) as (gateway, nodes):
        undisturbed = [(await generate(gateway, seed))[0] for seed in range(GENERATIONS)]
        assert len(set(undisturbed)) == GENERATIONS
        resumed = 0
        for seed in range(GENERATIONS):
            # Once so many steps are done: anywhere from the encoders to the decoder.
            fatal, done = draw.randrange(STEPS + 1), 0
            victim: RealNode | None = None

            async def kill_in_time(kind, event, fatal=fatal):
                nonlocal done, victim, resumed
                resumed += kind == "resumed"
                done = event.stepped.step if kind == "stepped" else done
                if done >= fatal and victim is None:
                    names = {f"unix:{tmp_path}/{n.node_id}.sock" for n in busy(gateway)}
                    candidates = [n for n in nodes if n.address in names] or nodes
                    victim = draw.choice(candidates)
                    await victim.kill()

            png, repeated = await generate(gateway, seed, kill_in_time)
            assert png == undisturbed[seed]
            assert repeated <= EVERY
            if victim is not None:
                await victim.start()
        # Most of the kills hit the node at work: the test tests something.
        assert resumed > GENERATIONS / 4
        counts = gateway.debug_counts()
        assert not any(counts[name] for name in ("flights", "runs", "assigned", "waiting"))


def busy(gateway: Gateway):
    """The connections that have tasks now."""
    return [c for c in gateway.fleet.connections.values() if c.assigned]


@both
async def test_many_generations_at_once_survive_the_death_of_a_node(tmp_path, policy):
    async with service(tmp_path, "abc", 0.005, policy) as (gateway, nodes):
        calm = await asyncio.gather(*(generate(gateway, seed) for seed in range(12)))
        killed = asyncio.Event()

        async def kill_one(kind, event):
            if kind == "stepped" and event.stepped.step >= STEPS // 2 and not killed.is_set():
                killed.set()
                await nodes[1].kill()

        wild = await asyncio.gather(*(generate(gateway, seed, kill_one) for seed in range(12)))
        assert killed.is_set()
        assert [png for png, _ in wild] == [png for png, _ in calm]


@both
async def test_the_only_node_dies_and_the_request_waits_for_it_to_come_back(tmp_path, policy):
    async with service(tmp_path, "a", 0.002, policy) as (gateway, nodes):
        undisturbed, _ = await generate(gateway, 1)
        killed = asyncio.Event()

        async def kill_it(kind, event):
            if kind == "stepped" and event.stepped.step >= 10 and not killed.is_set():
                killed.set()
                await nodes[0].kill()
                await nodes[0].start()

        png, repeated = await generate(gateway, 1, kill_it)
        assert killed.is_set()
        assert png == undisturbed
        assert repeated <= EVERY
