# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The timesteps of a request, and its latents before the first of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor

from kubediffusion.errors import InvalidInput, UnsupportedModel
from kubediffusion.models.base import LoadSpec, PortValue
from kubediffusion.models.sd3.ports import number, tensor


class Sampling:
    """How the pipeline in `spec` samples with `transformer`."""

    def __init__(self, spec: LoadSpec, transformer: Any) -> None:
        self._scheduler_config = _scheduler_config(spec)
        self._vae_scale_factor = _vae_scale_factor(spec)
        self._device, self._dtype = transformer.device, transformer.dtype
        self._channels = transformer.config.in_channels
        self._patch_size = transformer.config.patch_size

    def schedule(self, inputs: Mapping[str, PortValue]) -> tuple[Any, torch.Tensor]:
        """A scheduler of the request's own, and the timesteps that are left after `strength`."""
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(self._scheduler_config)
        steps = int(number(inputs, "steps"))
        shift: dict[str, float] = {}
        if scheduler.config.get("use_dynamic_shifting"):
            shape = self._latent_shape(inputs)
            patch = self._patch_size
            config = scheduler.config
            shift["mu"] = calculate_shift(
                (shape[2] // patch) * (shape[3] // patch),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
        scheduler.set_timesteps(steps, device=self._device, **shift)
        timesteps = scheduler.timesteps
        if "init.latents" in inputs:
            strength = number(inputs, "strength")
            first = int(max(steps - min(steps * strength, steps), 0))
            timesteps = timesteps[first * scheduler.order :]
            scheduler.set_begin_index(first * scheduler.order)
        if len(timesteps) < 1:
            raise InvalidInput("it leaves no step to run; raise it", field="strength")
        return scheduler, timesteps

    def _latent_shape(self, inputs: Mapping[str, PortValue]) -> tuple[int, int, int, int]:
        height, width = int(number(inputs, "height")), int(number(inputs, "width"))
        factor = self._vae_scale_factor
        return (1, self._channels, height // factor, width // factor)

    def first_latents(
        self,
        inputs: Mapping[str, PortValue],
        scheduler: Any,
        timesteps: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        device, dtype = self._device, self._dtype
        if "init.latents" not in inputs:
            shape = self._latent_shape(inputs)
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        init = tensor(inputs, "init.latents").to(device, dtype)
        noise = randn_tensor(init.shape, generator=generator, device=device, dtype=dtype)
        init = scheduler.scale_noise(init, timesteps[:1].repeat(1), noise)
        return init.to(device=device, dtype=dtype)


def _scheduler_config(spec: LoadSpec) -> dict[str, Any]:
    folder = spec.pipeline_path / "scheduler"
    try:
        config = json.loads((folder / "scheduler_config.json").read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"{folder} has no readable scheduler_config.json: {error}", reason="WrongArchitecture"
        ) from error
    name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise UnsupportedModel(
            f"this family samples with FlowMatchEulerDiscreteScheduler, not with {name}",
            reason="WrongArchitecture",
        )
    return config


def _vae_scale_factor(spec: LoadSpec) -> int:
    """Pixels a latent; 8 where the VAE's config does not lie beside, as diffusers has it."""
    try:
        config = json.loads((spec.pipeline_path / "vae" / "config.json").read_text())
        return 2 ** (len(config["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError):
        return 8
