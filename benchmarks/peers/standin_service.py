# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Our own service with stand-in models: a gateway process over one node process for each stage."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import json_format

from kubediffusion.v1alpha1 import node_pb2
from kubediffusion.workflow import (
    InputSpec,
    InputType,
    ModelRef,
    PortRef,
    ResolvedWorkflow,
    Slo,
)
from kubediffusion.workflow.graph import FromInputs, FromNodes, Graph, Node

WORKFLOW = "standin"
SOCKET = "gateway.sock"
STAGES = {"text_encoder": "encode", "transformer": "denoise", "vae": "decode"}


def three_stages(options: dict[str, str] | None = None) -> ResolvedWorkflow:
    """encode -> denoise -> decode, each a model of its own."""
    models = {
        role: ModelRef(
            role=role,
            identity=f"standin-{role}",
            family="standin",
            component=role,
            uri="file:///",
            revision="",
            subfolder="",
            variant="",
            dtype="float32",
            class_name="",
            options=dict(options or {}),
        )
        for role in STAGES
    }
    value = {name: (name, FromInputs((name,))) for name in ("seed", "steps")}
    nodes = (
        Node("prompt", "text_encoder", "encode", (("text", FromInputs(("prompt",))),), ("embeds",)),
        Node(
            "denoise",
            "transformer",
            "denoise",
            (
                ("prompt_1.embeds", FromNodes((PortRef("prompt", "embeds"),))),
                value["seed"],
                value["steps"],
            ),
            ("latents",),
        ),
        Node(
            "decode",
            "vae",
            "decode",
            (("latents", FromNodes((PortRef("denoise", "latents"),))),),
            ("image",),
        ),
    )
    inputs = (
        InputSpec("prompt", InputType.TEXT, required=True, max_length=10_000),
        InputSpec("steps", InputType.INTEGER, default=4, minimum=1, maximum=1000),
        InputSpec("seed", InputType.INTEGER, minimum=0),
    )
    return ResolvedWorkflow(
        name=WORKFLOW,
        family="sd3",
        models=models,
        graph=Graph(nodes, PortRef("decode", "image")),
        inputs={spec.name: spec for spec in inputs},
        loras={},
        slo=Slo(),
        numerics="exact",
    )


def model_spec(ref: ModelRef) -> node_pb2.ModelSpec:
    return node_pb2.ModelSpec(
        identity=ref.identity,
        family=ref.family,
        component=ref.component,
        uri=ref.uri,
        options=ref.options,
    )


def processes(folder: Path) -> list[tuple[Callable[..., None], tuple[object, ...]]]:
    """Targets and arguments: three nodes and the gateway."""
    targets: list[tuple[Callable[..., None], tuple[object, ...]]] = []
    addresses: list[str] = []
    for role, ref in three_stages().models.items():
        plan = node_pb2.SetResidencyRequest(generation=1, models=[model_spec(ref)])
        residency = folder / f"{role}.json"
        residency.write_text(json_format.MessageToJson(plan))
        address = f"unix:{folder}/{role}.sock"
        addresses.append(address)
        targets.append((serve_node, (role, address, residency)))
    targets.append((serve_gateway, (f"unix:{folder}/{SOCKET}", addresses)))
    return targets


@dataclass(frozen=True)
class NoFiles:
    """Stand-ins have no weights: their source is a folder with nothing to load in it."""

    path: Path


def serve_node(node_id: str, address: str, residency: Path) -> None:
    from kubediffusion import models
    from kubediffusion.node.config import NodeConfig
    from kubediffusion.node.library import Library
    from kubediffusion.node.process import run_process

    config = NodeConfig(node_id, address, residency=residency, threads=1, log_level="WARNING")
    library = Library(models.family, lambda uri, *_, **__: NoFiles(residency.parent / "none"))
    run_process(config, library)


def serve_gateway(address: str, nodes: list[str]) -> None:
    asyncio.run(_serve_gateway(address, nodes))


async def _serve_gateway(address: str, nodes: list[str]) -> None:
    from kubediffusion.gateway.core import Gateway
    from kubediffusion.gateway.server import Doors, serve

    gateway = Gateway()
    await gateway.start()
    gateway.set_workflows({WORKFLOW: three_stages()})
    gateway.set_nodes(nodes)
    async with serve(gateway, Doors(grpc=address)):
        await asyncio.Event().wait()
