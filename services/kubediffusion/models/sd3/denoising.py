# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A request between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from kubediffusion.errors import InvalidInput
from kubediffusion.models.base import CheckpointState, PortValue
from kubediffusion.models.caching import LeaseCache
from kubediffusion.models.preview import picture_of
from kubediffusion.models.pruning import LeasePruning
from kubediffusion.models.random import generator_of, state_of
from kubediffusion.models.sd3.conditioning import Conditioning


class Sd3Denoising:
    """`models.base.Denoising` of one request."""

    def __init__(
        self,
        conditioning: Conditioning,
        scheduler: Any,
        timesteps: torch.Tensor,
        latents: torch.Tensor,
        generator: torch.Generator,
        step: int = 0,
    ) -> None:
        self.conditioning = conditioning
        self.scheduler = scheduler
        self.timesteps = timesteps
        self.latents = latents
        self.generator = generator
        # Noise levels in [0, 1], as numbers, since reading one off a device waits for it: of
        # the whole grid, also where the request begins later or was resumed, and of its steps.
        self.sigmas = _levels(scheduler, scheduler.timesteps)
        self._own_sigmas = _levels(scheduler, timesteps)
        # How many tokens it keeps, at which step, and which steps it leaves out; the denoiser says
        # so.
        self.pruning = LeasePruning(None, 0)
        self.step_cache: LeaseCache | None = None
        self._resumed_at = step
        # The prompt's velocity at the next step, where the negative prompt's comes from elsewhere.
        self.own: torch.Tensor | None = None
        self._step = step
        # What the last step started from: latents, velocity, timestep; for previews.
        self._last: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def step(self) -> int:
        return self._step

    @property
    def total_steps(self) -> int:
        return len(self.timesteps)

    @property
    def timestep(self) -> torch.Tensor:
        return self.timesteps[self._step]

    @property
    def sigma(self) -> float:
        """The noise level of the next step."""
        return self._own_sigmas[self._step]

    def checkpoint(self) -> CheckpointState:
        tensors = {"latents": self.latents.clone(), "generator": state_of(self.generator)}
        return CheckpointState(self._step, self.total_steps, tensors)

    def preview(self) -> np.ndarray:
        if self._last is None:
            return picture_of(self.latents)
        latents, velocity, timestep = self._last
        sigma = timestep.item() / self.scheduler.config.num_train_timesteps
        return picture_of(latents - sigma * velocity)

    def finish(self) -> Mapping[str, PortValue]:
        outputs: dict[str, PortValue] = {"latents": self.latents}
        if self.step_cache is not None and 0 < self._resumed_at < self.total_steps:
            outputs["warnings"] = [
                f"the request went on from a checkpoint after step {self._resumed_at}, and its "
                "step cache began anew there: uninterrupted it may draw a slightly other picture"
            ]
        return outputs

    def apply(self, velocity: torch.Tensor) -> None:
        """One step of the sampler, from the model's guided output (1, C, h, w)."""
        dtype = self.latents.dtype
        self._last = (self.latents, velocity, self.timestep)
        self.latents = self.scheduler.step(
            velocity, self.timestep, self.latents, generator=self.generator, return_dict=False
        )[0]
        self.latents = self.latents.to(dtype)
        self.own = None
        self._step += 1


def _levels(scheduler: Any, timesteps: torch.Tensor) -> tuple[float, ...]:
    return tuple((timesteps.double() / scheduler.config.num_train_timesteps).tolist())


def resumed(
    conditioning: Conditioning,
    scheduler: Any,
    timesteps: torch.Tensor,
    state: CheckpointState,
    device: Any,
) -> Sd3Denoising:
    """Where `state` left off. Raises InvalidInput for a checkpoint of another request."""
    if state.total_steps != len(timesteps) or not 0 <= state.step <= len(timesteps):
        raise InvalidInput(
            f"the checkpoint is of {state.total_steps} steps, the request of {len(timesteps)}",
            field="resume",
        )
    latents = state.tensors["latents"].to(device)
    generator = generator_of(state.tensors["generator"])
    if state.step < len(timesteps):
        # A begin index makes the scheduler count from there, as it would have come to count.
        scheduler.set_begin_index((scheduler.begin_index or 0) + state.step)
    return Sd3Denoising(conditioning, scheduler, timesteps, latents, generator, state.step)
