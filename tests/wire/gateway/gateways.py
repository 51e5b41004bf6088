# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A gateway over fake nodes that serve Stable Diffusion 3's five models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from fake_nodes import FakeNode

from kubediffusion.api import load_workflow
from kubediffusion.gateway.config import GatewayConfig, RetryLimits
from kubediffusion.gateway.core import Gateway
from kubediffusion.tensors import encode_value
from kubediffusion.v1alpha1 import gateway_pb2
from kubediffusion.workflow import PipelineIndex, ResolvedWorkflow, Slo, resolve

COMPONENTS = {
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder_3": "T5EncoderModel",
    "transformer": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}
TEXT = """
apiVersion: kubediffusion.io/v1alpha1
kind: DiffusionWorkflow
metadata: {name: sd3}
spec:
  pipeline:
    preset: StableDiffusion3
    source: {uri: "file:///models/fake"}
"""
CONFIG = GatewayConfig(
    checkpoint_every=4, retries=RetryLimits(backoff_first=0.001, backoff_most=0.01)
)


def workflow(slo: Slo | None = None) -> ResolvedWorkflow:
    resolved = resolve(load_workflow(TEXT), PipelineIndex(COMPONENTS))
    return replace(resolved, slo=slo) if slo is not None else resolved


def identities(resolved: ResolvedWorkflow, *roles: str) -> dict[str, str]:
    """Kinds of fake models by identity; of these roles, or of all."""
    kinds = {"transformer": "dit", "vae": "vae"}
    return {
        ref.identity: kinds.get(role, "text")
        for role, ref in resolved.models.items()
        if not roles or role in roles
    }


def request(**fields: object) -> gateway_pb2.GenerateRequest:
    """Keyword arguments are fields of the request, or else inputs."""
    known = {field.name for field in gateway_pb2.GenerateRequest.DESCRIPTOR.fields}
    inputs: dict[str, object] = {"prompt": "a fox", "steps": 8, "seed": 7}
    inputs |= {name: value for name, value in fields.items() if name not in known}
    message = gateway_pb2.GenerateRequest(
        **{"workflow": "sd3", **{k: v for k, v in fields.items() if k in known}}  # type: ignore
    )
    for name, value in inputs.items():
        if value is not None:
            message.inputs[name].CopyFrom(encode_value(value))
    return message


@asynccontextmanager
async def gateway_over(
    nodes: Sequence[FakeNode],
    workflows: Mapping[str, ResolvedWorkflow] | None = None,
    config: GatewayConfig = CONFIG,
) -> AsyncIterator[Gateway]:
    """The nodes are started and stopped too."""
    for node in nodes:
        await node.start()
    gateway = Gateway(config)
    await gateway.start()
    try:
        gateway.set_workflows(workflows or {"sd3": workflow()})
        gateway.set_nodes([node.address for node in nodes])
        yield gateway
    finally:
        await gateway.stop()
        for node in nodes:
            await node.stop()


def one_node(path: Path, name: str = "a", **more: object) -> FakeNode:
    return FakeNode(path, name, identities(workflow()), **more)  # type: ignore[arg-type]


async def events_of(
    gateway: Gateway, message: gateway_pb2.GenerateRequest
) -> list[gateway_pb2.GenerateEvent]:
    return [event async for event in gateway.generate(message)]


def images(events: Sequence[gateway_pb2.GenerateEvent]) -> list[gateway_pb2.Image]:
    found = [event for event in events if event.WhichOneof("kind") == "image"]
    return [event.image for event in sorted(found, key=lambda event: event.index)]


def kinds(events: Sequence[gateway_pb2.GenerateEvent]) -> list[str]:
    return [event.WhichOneof("kind") or "" for event in events]


def assert_empty(gateway: Gateway) -> None:
    """Nothing is under way and nothing was forgotten."""
    counts = gateway.debug_counts()
    counts.pop("releases")  # sent together, a little later
    assert not any(counts.values()), counts


async def changed(gateway: Gateway, condition: Callable[[], bool]) -> None:
    """Waits until a change of the fleet makes it true."""
    happened = asyncio.Event()

    def look() -> None:
        if condition():
            happened.set()

    gateway.fleet.wait(look)
    look()
    try:
        await asyncio.wait_for(happened.wait(), 60)
    finally:
        gateway.fleet.unwait(look)
