# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Steps that a lease shares with helpers on other nodes: the device thread's half of it.

A step of such a lease is: ask each helper for its part, compute the own branch, and let go of the
device; when the parts are here, assemble the step. Until then the lease is still at its last
boundary, so it can be yielded, cancelled, or go on without a helper that was lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, TypeAlias

import torch

from kubediffusion.errors import HelperLost, InvalidInput, KubeDiffusionError
from kubediffusion.models.base import Denoising, Divisible, Part
from kubediffusion.node import ports
from kubediffusion.tensors import TensorStore, stored
from kubediffusion.v1alpha1 import node_pb2, tensor_pb2

if TYPE_CHECKING:
    from kubediffusion.node.tasks import Task

log = logging.getLogger(__name__)

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


def divisible(task: Task) -> Divisible:
    """Raises InvalidInput where the model's steps have no parts."""
    model = task.resident.loaded
    if not isinstance(model, Divisible):
        raise InvalidInput(f"{task.model} cannot divide its steps", field="helpers")
    return model


class StepSharing:
    """All methods are the device thread's; they may raise, which is the lease's end."""

    def __init__(
        self,
        store: TensorStore,
        tell_sharing: Callable[[Task, Share, Constants], None],
        tell_asking: Callable[[Task, Share, node_pb2.AssistStep], None],
    ) -> None:
        self._store = store
        self._tell_sharing = tell_sharing
        self._tell_asking = tell_asking

    def begin(self, task: Task) -> None:
        """Looks for the helpers of a lease that begins: those that are elsewhere."""
        for helper, resident in zip(task.assign.lease.helpers, task.helpers, strict=True):
            if not helper.address:
                continue
            part = PARTS[helper.kind]
            share = Share(helper, part, resident is None and part is Part.CONTROL)
            try:
                constants = self._constants(task, share)
            except InvalidInput as error:
                if share.required:
                    raise
                log.info("lease %s needs no helper: %s", "/".join(task.name), error)
            else:
                task.shares.append(share)
                self._tell_sharing(task, share, constants)

    def advance(self, task: Task) -> bool:
        """A step up to where a part from elsewhere is missing, or to its end: whether it is done.

        One that is not done waits, and stays the device's current lease meanwhile.
        """
        begin, denoiser, denoising = perf_counter(), divisible(task), task.denoising
        assert denoising is not None
        if not task.own_seconds:  # until it was measured
            left = denoising.total_steps - denoising.step
            task.own_seconds = task.remaining_seconds() / left / 2
        self._ask(task, denoiser, denoising)
        if not task.parted and any(s.open and s.part is Part.BRANCH for s in task.shares):
            denoiser.own(denoising)
            task.parted, task.own_seconds = True, perf_counter() - begin
        if any(share.pending for share in task.shares):
            task.waiting, task.waiting_since = True, perf_counter()
            return False
        parts = {share.key: share.answer for share in task.shares if share.answer is not None}
        denoiser.assemble(denoising, parts)
        task.parted = False
        task.steps_run += 1
        task.steps_helped += bool(parts)
        self._free_sent(task)
        return True

    def joined(self, task: Task, share: Share) -> None:
        share.open = True
        # Where the lease waits, it is for this: now the helper can be asked.
        task.waiting = False

    def answered(
        self,
        task: Task,
        share: Share,
        step: int,
        refs: Sequence[tensor_pb2.TensorRef],
        fetched: ports.Arrays,
    ) -> None:
        if share.asked == step:
            share.answer = [ports.tensor(ref, fetched) for ref in refs]
            share.answered = True
            self._go_on(task)

    def left(self, task: Task, share: Share, why: KubeDiffusionError) -> None:
        """Raises HelperLost where the lease cannot go on without it."""
        task.shares.remove(share)
        who = f"{share.helper.name or share.helper.model} at {share.helper.address}"
        if share.required:
            raise HelperLost(f"helper {who}: {why.message}")
        log.info("lease %s goes on without %s: %s", "/".join(task.name), who, why.message)
        self._go_on(task)

    def forget(self, task: Task) -> None:
        """The lease is over."""
        task.waiting = False
        task.shares.clear()
        self._free_sent(task)

    # ------------------------------------------------------------ inside

    def _constants(self, task: Task, share: Share) -> Constants:
        """For the wire; the large ones stay in the store until the helper has them."""
        assert task.denoising is not None
        found = divisible(task).constants(task.denoising, *share.key)
        prefix = f"{task.prefix}/{share.part.value}"
        constants = {
            name: ports.encode(self._store, task.scope, f"{prefix}/{name}", value)
            for name, value in found.items()
        }
        share.constants = [ref.id for value in constants.values() for ref in stored(value)]
        return constants

    def _ask(self, task: Task, denoiser: Divisible, denoising: Denoising) -> None:
        """Whoever was not asked for this step yet. All are sent the same latents."""
        step, latents = denoising.step, None
        for share in task.shares:
            if not share.open or share.asked == step:
                continue
            share.asked, share.answer = step, None
            wanted = denoiser.part_step(denoising, *share.key)
            if latents is None:
                name = f"{task.prefix}/latents/{step}"
                latents = ports.encode(self._store, task.scope, name, wanted.latents)
                task.sent += [ref.id for ref in stored(latents)]
            message = node_pb2.AssistStep(
                step=step, timestep=wanted.timestep, latents=latents.tensor, scale=wanted.scale
            )
            self._tell_asking(task, share, message)

    def _go_on(self, task: Task) -> None:
        if task.waiting and not any(share.pending for share in task.shares):
            task.waiting = False
            task.helper_wait_seconds += perf_counter() - task.waiting_since

    def _free_sent(self, task: Task) -> None:
        for tensor_id in task.sent:
            self._store.discard(tensor_id)
        task.sent.clear()
