# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Steps of which another node computes a part.

A ControlNet elsewhere changes no bit. A branch of guidance elsewhere is two forwards of one row in
the place of one of two rows, which may round otherwise: that is why it is for numerics fast.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from stages import InProcess

from benchmarks.reference import Case, Control, Setup, draw, inputs, workflow
from kubediffusion import api, models, sources
from kubediffusion import workflow as language
from kubediffusion.gateway.config import GatewayConfig
from kubediffusion.gateway.core import Gateway
from kubediffusion.models.base import Part, PartStep
from kubediffusion.node import ports
from kubediffusion.node.config import NodeConfig
from kubediffusion.node.library import Library
from kubediffusion.node.server import NodeServer
from kubediffusion.tensors import encode_value
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2

# Of latents with a deviation of about 1, after all steps. One in float32 rounds at 6e-8.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.15}
BRANCH = (Part.BRANCH, "")
CONTROLS = [
    Case("one", controls={"first": Control(0.8)}),
    Case("part of the steps", controls={"first": Control(0.7, 0.2, 0.8)}, steps=6),
    Case("without guidance", controls={"second": Control()}, guidance=1.0),
]
SEVERAL = Case("two", controls={"first": Control(0.6), "second": Control(0.9)}, loras={"one": 0.5})


def wired(value: Any) -> Any:
    """As it comes out of a message."""
    return ports.tensor(ports.inline("", value), {}) if isinstance(value, torch.Tensor) else value


def helped(here: InProcess, there: InProcess, case: Case, parts: Sequence[tuple[Part, str]]) -> Any:
    """A lease of `here` that `there` computes `parts` of; ControlNets among them are not here."""
    _, given, rest = here.prepare(case)
    away = {name for part, name in parts if part is Part.CONTROL}
    rest["controlnets"] = [(n, None if n in away else net) for n, net in rest["controlnets"]]
    denoiser = here.denoiser
    denoising = denoiser.start(given, **rest)
    sessions: dict[tuple[Part, str], Any] = {}
    for part, name in parts:
        model = there.denoiser if part is Part.BRANCH else there.models[f"controlnet.{name}"]
        constants = denoiser.constants(denoising, part, name)
        constants = {port: wired(value) for port, value in constants.items()}
        loras = rest["loras"] if part is Part.BRANCH else ()
        sessions[part, name] = model.help(part, constants, loras)
    while denoising.step < denoising.total_steps:
        answers: dict[tuple[Part, str], list[torch.Tensor]] = {}
        for (part, name), session in sessions.items():
            ask = denoiser.part_step(denoising, part, name)
            ask = PartStep(ask.step, ask.timestep, wired(ask.latents), ask.scale)
            answers[part, name] = [wired(value) for value in session.compute(ask)]
        if BRANCH in sessions:
            denoiser.own(denoising)
        denoiser.assemble(denoising, answers)
    return denoising


@pytest.fixture(params=["sd3-f32", "sd3-bf16", "sd35-f32"])
def twins(
    request: pytest.FixtureRequest, setup_of: Callable[[str], Setup]
) -> tuple[Setup, InProcess, InProcess]:
    setup = setup_of(request.param)
    return setup, InProcess(setup), InProcess(setup)


def test_a_control_net_elsewhere_is_byte_identical_to_diffusers(
    twins: tuple[Setup, InProcess, InProcess],
) -> None:
    setup, here, there = twins
    for case in CONTROLS:
        (name,) = case.controls
        denoising = helped(here, there, case, [(Part.CONTROL, name)])
        assert here.decode(denoising) == draw(setup, case), case.name
    # The first of several decides what all of them are given, so it is the second that may be away.
    denoising = helped(here, there, SEVERAL, [(Part.CONTROL, "second")])
    assert here.decode(denoising) == draw(setup, SEVERAL)


def test_a_branch_elsewhere_is_close(twins: tuple[Setup, InProcess, InProcess]) -> None:
    setup, here, there = twins
    for case in (Case("plain", negative_prompt="blue"), Case("lora", loras={"one": 0.8})):
        alone = here.start(case)
        while alone.step < alone.total_steps:
            here.denoiser.advance([alone])
        divided = helped(here, there, case, [BRANCH])
        difference = (divided.latents - alone.latents).abs().max().item()
        assert difference <= TOLERANCE[setup.dtype], (case.name, difference)


def test_a_branch_that_never_came_is_computed_here(
    twins: tuple[Setup, InProcess, InProcess],
) -> None:
    """From the very step on that the helper was lost at, its own half being done."""
    setup, here, _ = twins
    case = Case("plain")
    denoising = here.start(case)
    here.denoiser.own(denoising)
    here.denoiser.assemble(denoising, {})
    while denoising.step < denoising.total_steps:
        here.denoiser.advance([denoising])
    alone = here.start(case)
    while alone.step < alone.total_steps:
        here.denoiser.advance([alone])
    difference = (denoising.latents - alone.latents).abs().max().item()
    assert difference <= TOLERANCE[setup.dtype]


# ---------------------------------------------------------------- through gateway and nodes


def residency(
    resolved: language.ResolvedWorkflow, roles: Sequence[str]
) -> list[node_pb2.ModelSpec]:
    return [
        node_pb2.ModelSpec(
            identity=ref.identity,
            family=ref.family,
            component=ref.component,
            uri=ref.uri,
            subfolder=ref.subfolder,
            dtype=ref.dtype,
            class_name=ref.class_name,
            options=ref.options,
        )
        for role, ref in resolved.models.items()
        if role in roles
    ]


@asynccontextmanager
async def served(
    setup: Setup, folder: Path, hosts: Mapping[str, Callable[[str], bool]]
) -> AsyncIterator[tuple[Gateway, dict[str, NodeServer], language.ResolvedWorkflow]]:
    """`hosts` says by node which roles it has."""
    setup = Setup(setup.path, setup.controlnets, {}, setup.dtype)
    definition = api.load_workflow(yaml.safe_dump(yaml.safe_load(workflow(setup, "helped"))))
    source = definition.spec.pipeline.source
    resolved = language.resolve(definition, sources.read_index(source.uri))
    nodes: dict[str, NodeServer] = {}
    gateway = Gateway(GatewayConfig(shm_dir=folder / "shm"))
    await gateway.start()
    try:
        for name, wanted in hosts.items():
            config = NodeConfig(
                name, f"unix:{folder}/{name}.sock", threads=1, shm_dir=folder / "shm"
            )
            nodes[name] = server = NodeServer(config, Library(models.family, sources.open))
            await server.start()
            server.residency.plan(
                1, "test", residency(resolved, [r for r in resolved.models if wanted(r)])
            )
            while not server.residency.settled:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        gateway.set_workflows({"helped": resolved})
        gateway.set_nodes([server.address for server in nodes.values()])
        yield gateway, nodes, resolved
    finally:
        await gateway.stop()
        for server in nodes.values():
            await server.stop(0.2)


async def drawn(gateway: Gateway, case: Case, numerics: Any = 0) -> bytes:
    request = gateway_pb2.GenerateRequest(
        workflow="helped",
        inputs={name: encode_value(value) for name, value in inputs(case).items()},
        numerics=numerics,
    )
    async with asyncio.timeout(240):
        async for event in gateway.generate(request):
            if event.WhichOneof("kind") == "image":
                return event.image.png
    raise AssertionError("no image")


def steps_done(server: NodeServer, identity: str, stage: str) -> float:
    labels = {"model": identity, "stage": stage, "outcome": "done"}
    return server.registry.get_sample_value("kubediffusion_node_tasks_total", labels) or 0.0


async def test_a_control_net_on_another_node_is_byte_identical_to_diffusers(
    setup_of: Callable[[str], Setup], tmp_path: Path
) -> None:
    setup = setup_of("sd3-f32")
    hosts = {
        "one": lambda role: not role.startswith("controlnet"),
        "two": lambda role: role.startswith("controlnet"),
    }
    async with served(setup, tmp_path, hosts) as (gateway, nodes, resolved):
        for case in CONTROLS:
            assert await drawn(gateway, case) == draw(setup, case), case.name
        first = resolved.models["controlnet.first"].identity
        steps = sum(case.steps for case in CONTROLS if "first" in case.controls)
        assert steps_done(nodes["two"], first, "control") == steps
        assert all(node.store.stats().tensors == 0 for node in nodes.values())


async def test_a_branch_on_another_node_is_close_to_the_picture_of_one(
    setup_of: Callable[[str], Setup], tmp_path: Path
) -> None:
    setup = setup_of("sd3-f32")
    case = Case("plain", negative_prompt="blue", steps=12)
    hosts = {
        "one": lambda role: role != "transformer",
        "two": lambda role: role == "transformer",
        "three": lambda role: role == "transformer",
    }
    fast = node_pb2.NUMERICS_FAST
    async with served(setup, tmp_path, hosts) as (gateway, nodes, resolved):
        dit = resolved.models["transformer"].identity
        alone = await drawn(gateway, case, fast)
        branches = 0.0
        for _ in range(20):  # steps are short: some leases are over before their helper is there
            # As if a step took so long that a second node gains.
            for _ in range(11):
                gateway.profiles.observe_run(
                    dit, "denoise", nodes["two"].fingerprint, 32 * 32 * case.steps, 1000.0
                )
            divided = await drawn(gateway, case, fast)
            pixels = [np.asarray(Image.open(io.BytesIO(png)), np.int16) for png in (alone, divided)]
            assert np.abs(pixels[0] - pixels[1]).max() <= 1  # of 255
            branches += sum(steps_done(server, dit, "branch") for server in nodes.values())
            if branches:
                break
        assert branches
