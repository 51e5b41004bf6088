# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Steps that a lease shares with helpers on other nodes: the device thread's half of it.

A step of such a lease is: ask each helper for its part, compute the own branch, and let go of the
device; when the parts are here, assemble the step. Until then the lease is still at its last
boundary, so it can be yielded, cancelled, or go on without a helper that was lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch

from kubediffusion.errors import InvalidInput, KubeDiffusionError
from kubediffusion.models.base import Divisible, Part
from kubediffusion.node import ports
from kubediffusion.tensors import TensorStore, stored
from kubediffusion.v1alpha1 import node_pb2, tensor_pb2

if TYPE_CHECKING:
    from kubediffusion.node.tasks import Task

PARTS = {
    node_pb2.Helper.KIND_CFG_BRANCH: Part.BRANCH,
    node_pb2.Helper.KIND_CONTROLNET: Part.CONTROL,
}
EXACT_BRANCH = (
    "two branches apart round otherwise than both in one forward, as diffusers computes them: "
    "guidance is divided between nodes only with numerics fast"
)
Constants: TypeAlias = "dict[str, tensor_pb2.Value]"


@dataclass(eq=False)
class Share:
    """One helper of one lease. The device thread's, but for what the loop is told with it."""

    helper: node_pb2.Helper
    part: Part
    # Its ControlNet is not here: without it the lease cannot go on.
    required: bool
    open: bool = False
    # Answered at least once: from then on it is known to be warm.
    answered: bool = False
    asked: int = -1
    answer: Sequence[torch.Tensor] | None = None
    # What the loop has still to free.
    constants: list[str] = field(default_factory=list[str])

    @property
    def key(self) -> tuple[Part, str]:
        return (self.part, self.helper.name if self.part is Part.CONTROL else "")

    @property
    def pending(self) -> bool:
        """Whether the lease has to wait for it."""
        return self.answer is None if self.open else self.required


def shares_of(task: Task) -> list[Share]:
    """A share for each helper that is elsewhere."""
    return [
        Share(helper, PARTS[helper.kind], resident is None and helper.kind in _REQUIRED)
        for helper, resident in zip(task.assign.lease.helpers, task.helpers, strict=True)
        if helper.address
    ]


def divisible(task: Task) -> Divisible:
    """Raises InvalidInput where the model's steps have no parts."""
    model = task.resident.loaded
    if not isinstance(model, Divisible):
        raise InvalidInput(f"{task.model} cannot divide its steps", field="helpers")
    return model


def constants_of(task: Task, share: Share, store: TensorStore) -> Constants:
    """For the wire; the large ones stay in `store` until the helper has them. Raises."""
    assert task.denoising is not None
    found = divisible(task).constants(task.denoising, *share.key)
    prefix = f"{task.prefix}/{share.part.value}"
    constants = {
        name: ports.encode(store, task.scope, f"{prefix}/{name}", value)
        for name, value in found.items()
    }
    share.constants = [ref.id for value in constants.values() for ref in stored(value)]
    return constants


def questions(task: Task, store: TensorStore) -> list[tuple[Share, node_pb2.AssistStep]]:
    """For the helpers that have not been asked for the next step. They share the latents."""
    assert task.denoising is not None
    step = task.denoising.step
    asks: list[tuple[Share, node_pb2.AssistStep]] = []
    latents: tensor_pb2.TensorRef | None = None
    for share in task.shares:
        if not share.open or share.asked == step:
            continue
        share.asked, share.answer = step, None
        wanted = divisible(task).part_step(task.denoising, *share.key)
        if latents is None:
            name = f"{task.prefix}/latents/{step}"
            latents = ports.encode(store, task.scope, name, wanted.latents).tensor
            task.sent += [ref.id for ref in stored(tensor_pb2.Value(tensor=latents))]
        message = node_pb2.AssistStep(
            step=step, timestep=wanted.timestep, latents=latents, scale=wanted.scale
        )
        asks.append((share, message))
    return asks


def answers(task: Task) -> Mapping[tuple[Part, str], Sequence[torch.Tensor]]:
    return {share.key: share.answer for share in task.shares if share.answer is not None}


def free_sent(task: Task, store: TensorStore) -> None:
    """The latents that helpers were sent."""
    for tensor_id in task.sent:
        store.discard(tensor_id)
    task.sent.clear()


def lost(share: Share, why: KubeDiffusionError) -> str:
    where = share.helper.address
    return f"{share.helper.name or share.helper.model} at {where}: {why.message}"


_REQUIRED = {node_pb2.Helper.KIND_CONTROLNET}
