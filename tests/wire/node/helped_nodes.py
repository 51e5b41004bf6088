# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Nodes whose leases have helpers: stand-in models, each part of whose steps waits for the test.

A stand-in's picture depends on both branches of each step and on ControlNets' residuals in order,
so a part that is lost, doubled, or of another step changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from puppets import Gateway, Rig, Shelf

from kubediffusion.models.base import Family, Helping, LoadSpec, Part, PartStep
from kubediffusion.models.standin import (
    STANDIN,
    StandinControlNet,
    StandinDenoiser,
    StandinDenoising,
)
from kubediffusion.v1alpha1 import node_pb2

BRANCH = node_pb2.Helper.KIND_CFG_BRANCH
CONTROL = node_pb2.Helper.KIND_CONTROLNET
FAST = node_pb2.NUMERICS_FAST
STEPS = 6


class _HeldPart:
    def __init__(self, inner: Helping, shelf: StandinShelf, part: Part) -> None:
        self._inner, self._shelf, self._part = inner, shelf, part

    def compute(self, step: PartStep) -> Sequence[torch.Tensor]:
        self._shelf.strings.pull(self._part.value)
        return [value.expand(self._shelf.wide).clone() for value in self._inner.compute(step)]


class _Denoiser(StandinDenoiser):
    def __init__(self, spec: LoadSpec, shelf: StandinShelf) -> None:
        super().__init__(spec)
        self._shelf = shelf

    def advance(self, batch: Sequence[StandinDenoising]) -> None:
        self._shelf.strings.batches.append(len(batch))
        self._shelf.strings.pull("step")
        super().advance(batch)

    def own(self, denoising: StandinDenoising) -> None:
        self._shelf.strings.pull("own")
        super().own(denoising)

    def assemble(self, denoising: StandinDenoising, parts: Mapping[Any, Any]) -> None:
        self._shelf.strings.pull("helped" if parts else "alone")
        super().assemble(denoising, {key: [v[:1] for v in parts[key]] for key in parts})

    def help(self, part: Part, constants: Any, loras: Any = ()) -> Helping:
        return _HeldPart(super().help(part, constants, loras), self._shelf, part)


class _ControlNet(StandinControlNet):
    def __init__(self, spec: LoadSpec, shelf: StandinShelf) -> None:
        super().__init__(spec)
        self._shelf = shelf

    def help(self, part: Part, constants: Any, loras: Any = ()) -> Helping:
        return _HeldPart(super().help(part, constants, loras), self._shelf, part)


class StandinShelf(Shelf):
    """`wide` copies of each number make a part too large to travel in its message."""

    wide = 1

    def family(self, name: str) -> Family:
        return Family(name, STANDIN.components, self.standin)

    def standin(self, spec: LoadSpec) -> Any:
        if spec.component == "transformer":
            return _Denoiser(spec, self)
        if spec.component == "controlnet":
            return _ControlNet(spec, self)
        return STANDIN.load(spec)


def standin(identity: str, component: str) -> node_pb2.ModelSpec:
    return node_pb2.ModelSpec(
        identity=identity, family="standin", component=component, uri="test://w"
    )


DIT, NET = standin("dit", "transformer"), standin("net", "controlnet")


async def node(folder: Path, node_id: str, *models: node_pb2.ModelSpec, **config: Any) -> Rig:
    rig = Rig(folder, node_id, StandinShelf(folder), shm_dir=folder / "shm", **config)
    return await rig.start(models)


def helper(rig: Rig, kind: Any = BRANCH) -> node_pb2.Helper:
    """The other node as a lease is told of it; `rig` may be a node that is there no more."""
    name, model = ("edges", "net") if kind == CONTROL else ("", "dit")
    return node_pb2.Helper(kind=kind, model=model, address=rig.server.address, name=name)


def here() -> node_pb2.Helper:
    return node_pb2.Helper(kind=CONTROL, model="net", name="edges")


async def denoise(
    gateway: Gateway, request: str, *helpers: node_pb2.Helper, fast: bool = True, **fields: Any
) -> None:
    """A lease whose picture depends on its negative prompt."""
    inputs = {
        "label": "a picture",
        "steps": STEPS,
        "seed": 7,
        "negative": "ugly",
        **fields.pop("inputs", {}),
    }
    numerics = FAST if fast else node_pb2.NUMERICS_EXACT
    await gateway.denoise(request, inputs=inputs, helpers=helpers, numerics=numerics, **fields)


def latents(done: node_pb2.Done) -> bytes:
    return done.outputs["latents"].tensor.inline


async def drawn(rig: Rig, *helpers: node_pb2.Helper, fast: bool = True, **fields: Any) -> bytes:
    """What the lease gives on one node alone."""
    gateway = await rig.gateway("alone")
    await denoise(gateway, "alone", *helpers, fast=fast, **fields)
    done = await gateway.event("done", "alone")
    await gateway.leave()
    return latents(done)
