# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Real node processes with stand-in models, started again when they are killed."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from kubediffusion.v1alpha1 import node_pb2
from kubediffusion.workflow import InputSpec, InputType, ModelRef, PortRef, ResolvedWorkflow, Slo
from kubediffusion.workflow.graph import FromInputs, FromNodes, Graph, Node

ROLES = ("text_encoder", "transformer", "vae")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["kubediffusion.node.process", "kubediffusion.models.standin"])


def three_stages(step_seconds: float) -> ResolvedWorkflow:
    """encode -> denoise -> decode over one stand-in model each."""
    models = {
        role: ModelRef(
            role=role,
            identity=f"standin-{role}",
            family="standin",
            component=role,
            uri="file:///standin",
            revision="",
            subfolder="",
            variant="",
            dtype="float32",
            class_name="",
            options={"step_seconds": str(step_seconds)},
        )
        for role in ROLES
    }
    embeds = FromNodes((PortRef("prompt", "embeds"),))
    latents = FromNodes((PortRef("denoise", "latents"),))
    request = tuple((name, FromInputs((name,))) for name in ("seed", "steps"))
    nodes = (
        Node("prompt", "text_encoder", "encode", (("text", FromInputs(("prompt",))),), ("embeds",)),
        Node(
            "denoise",
            "transformer",
            "denoise",
            (("prompt_1.embeds", embeds), *request),
            ("latents",),
        ),
        Node("decode", "vae", "decode", (("latents", latents),), ("image",)),
    )
    inputs = (
        InputSpec("prompt", InputType.TEXT, required=True, max_length=1000),
        InputSpec("steps", InputType.INTEGER, default=20, minimum=1, maximum=1000),
        InputSpec("seed", InputType.INTEGER, minimum=0),
    )
    return ResolvedWorkflow(
        name="standin",
        family="sd3",
        models=models,
        graph=Graph(nodes, PortRef("decode", "image")),
        inputs={spec.name: spec for spec in inputs},
        loras={},
        slo=Slo(activation_timeout_seconds=60.0),
        numerics="exact",
    )


@dataclass(frozen=True)
class NoFiles:
    """Stand-ins have no weights."""

    path: Path


def serve(node_id: str, address: str, residency: Path) -> None:
    """In the node's process."""
    from kubediffusion import models
    from kubediffusion.node.config import NodeConfig
    from kubediffusion.node.library import Library
    from kubediffusion.node.process import run_process

    config = NodeConfig(node_id, address, residency=residency, threads=1, log_level="ERROR")
    library = Library(models.family, lambda uri, *_, **__: NoFiles(residency.parent / "none"))
    run_process(config, library)


class RealNode:
    """A process; `kill` is kill -9, and `start` begins another one at the same address."""

    def __init__(self, folder: Path, name: str, models: Mapping[str, ModelRef]) -> None:
        specs = [
            node_pb2.ModelSpec(
                identity=ref.identity,
                family=ref.family,
                component=ref.component,
                uri=ref.uri,
                options=ref.options,
            )
            for ref in models.values()
        ]
        plan = node_pb2.SetResidencyRequest(generation=1, models=specs)
        self.address = f"unix:{folder}/{name}.sock"
        self._residency = folder / f"{name}.json"
        self._residency.write_text(json_format.MessageToJson(plan))
        self._name = name
        self._process: Any = None

    async def start(self) -> None:
        arguments = (self._name, self.address, self._residency)
        self._process = _context.Process(target=serve, args=arguments, daemon=True)
        await asyncio.to_thread(self._process.start)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    async def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.join, 60)

    async def stop(self) -> None:
        if self._process is not None and self._process.is_alive():
            await self.kill()
