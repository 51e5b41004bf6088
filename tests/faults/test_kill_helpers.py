# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""kill -9 of real node processes that compute a part of another node's lease, or are helped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from real_nodes import RealNode, three_stages

from kubediffusion.gateway.config import GatewayConfig
from kubediffusion.gateway.core import Gateway
from kubediffusion.scheduling.assist import is_idle
from kubediffusion.tensors import encode_value
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2
from kubediffusion.workflow import InputSpec, InputType, PortRef, ResolvedWorkflow
from kubediffusion.workflow.graph import FromInputs, FromNodes

STEPS = 20
EVERY = 4
STEP_SECONDS = 0.04
CONTROL = "standin-controlnet"


def guided(controlled: bool = False) -> ResolvedWorkflow:
    """Three stages of which the second has two branches, or else a ControlNet."""
    resolved = three_stages(STEP_SECONDS)
    encode, denoise, decode = resolved.graph.nodes
    ports = [*denoise.inputs, ("negative", FromInputs(("negative",)))]
    ports.append(("guidance", FromInputs(("guidance",))))
    models = dict(resolved.models)
    if controlled:
        ports.append(("control.edges.latents", FromNodes((PortRef("prompt", "embeds"),))))
        net = replace(models["vae"], role="controlnet.edges", component="controlnet")
        models[net.role] = replace(net, identity=CONTROL)
    inputs = (
        InputSpec("negative", InputType.TEXT, default="", max_length=100),
        InputSpec("guidance", InputType.NUMBER, default=4.0, minimum=0.0, maximum=20.0),
    )
    nodes = (encode, replace(denoise, inputs=tuple(ports)), decode)
    return replace(
        resolved,
        models=models,
        graph=replace(resolved.graph, nodes=nodes),
        inputs=dict(resolved.inputs) | {spec.name: spec for spec in inputs},
    )


@asynccontextmanager
async def service(resolved: ResolvedWorkflow, nodes: Sequence[RealNode]) -> AsyncIterator[Gateway]:
    gateway = Gateway(GatewayConfig(checkpoint_every=EVERY))
    try:
        for node in nodes:
            await node.start()
        await gateway.start()
        gateway.set_workflows({"standin": resolved})
        gateway.set_nodes([node.address for node in nodes])
        yield gateway
    finally:
        await gateway.stop()
        for node in nodes:
            await node.stop()


async def generate(gateway: Gateway, fast: bool, at: int = 0, kill: str = "") -> tuple[bytes, bool]:
    """The picture, and whether somebody was killed: once so many steps are done, who is in `kill`:
    the "helper" or the "lease" that it helps."""
    request = gateway_pb2.GenerateRequest(
        workflow="standin",
        inputs={k: encode_value(v) for k, v in {"prompt": "a", "steps": STEPS, "seed": 1}.items()},
        numerics=node_pb2.NUMERICS_FAST if fast else node_pb2.NUMERICS_EXACT,
    )
    png, killed = b"", False
    async with asyncio.timeout(240):
        async for event in gateway.generate(request):
            if event.WhichOneof("kind") == "image":
                png = event.image.png
            elif event.WhichOneof("kind") == "stepped" and event.stepped.step >= at and kill:
                helper, lease = helping(gateway)
                if helper and not killed:
                    killed = True
                    await NODES[helper if kill == "helper" else lease].kill()
    return png, killed


NODES: dict[str, RealNode] = {}


def helping(gateway: Gateway) -> tuple[str, str]:
    """Addresses of a node that helps and of the one that it helps."""
    for flight in gateway.flights:
        for run in flight.runs:
            attempt = run.tasks["denoise"].attempt
            if attempt is not None and attempt.helpers.addresses:
                return next(iter(attempt.helpers.addresses)), attempt.node.address
    return "", ""


def made(folder: Path, resolved: ResolvedWorkflow, **roles: Sequence[str]) -> list[RealNode]:
    """Nodes by name with these models, or all."""
    NODES.clear()
    for name, wanted in roles.items():
        models = {r: m for r, m in resolved.models.items() if not wanted or r in wanted}
        node = RealNode(folder, name, models)
        NODES[node.address] = node
    return [*NODES.values()]


def as_if_slow(gateway: Gateway) -> None:
    """As if steps had been measured to take long: then an idle node is worth asking for help."""
    fingerprint = next(iter(gateway.fleet.connections.values())).fingerprint
    for _ in range(20):
        gateway.profiles.observe_run(
            "standin-transformer", "denoise", fingerprint, float(STEPS), 1000.0
        )


async def calm(gateway: Gateway) -> None:
    """Until every node is there and has said that it is idle."""
    async with asyncio.timeout(60):
        while True:
            states = gateway.fleet.states()
            if len(states) == len(NODES) and all(is_idle(state, 0.0) for state in states):
                return
            await asyncio.sleep(0.01)


async def test_the_picture_is_the_same_whoever_of_two_nodes_is_killed(tmp_path: Path) -> None:
    resolved = guided()
    ends, denoiser = ("text_encoder", "vae"), ("transformer",)
    nodes = made(tmp_path, resolved, a=denoiser, b=denoiser, c=denoiser, ends=ends)
    async with service(resolved, nodes) as gateway:
        expected, _ = await generate(gateway, fast=False)
        for kill, at in (("", 0), ("helper", 1), ("lease", 3), ("helper", 8), ("lease", 12)):
            await calm(gateway)
            as_if_slow(gateway)
            png, killed = await generate(gateway, fast=True, at=at, kill=kill)
            assert png == expected, (kill, at)
            assert killed == bool(kill), (kill, at)
            for node in NODES.values():
                if not node.alive:
                    await node.start()
        counts = gateway.debug_counts()
        assert not any(counts[name] for name in ("flights", "runs", "assigned", "waiting"))
        assert not any(node.helping for node in gateway.fleet.connections.values())


async def test_a_control_net_whose_node_is_killed_goes_on_on_another(tmp_path: Path) -> None:
    resolved = guided(controlled=True)
    whole = ("text_encoder", "transformer", "vae")
    net = ("controlnet.edges",)
    nodes = made(tmp_path, resolved, a=whole, b=net, c=net)
    async with service(resolved, nodes) as gateway:
        expected, _ = await generate(gateway, fast=False)
        png, killed = await generate(gateway, fast=False, at=6, kill="helper")
        assert killed
        assert png == expected
    resolved = guided()
    async with service(resolved, made(tmp_path, resolved, d=())) as gateway:
        assert (await generate(gateway, fast=False))[0] != expected  # the ControlNet counts
