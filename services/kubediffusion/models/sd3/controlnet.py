# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""ControlNets: called by the denoiser beside it at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetModel

from kubediffusion.errors import InvalidInput
from kubediffusion.models.base import LoadSpec, Lora, Part, PartStep, PortValue
from kubediffusion.models.loading import load_module, nbytes_of
from kubediffusion.models.sd3.ports import tensor


class Sd3ControlNet:
    """`models.base.Model`, without a stage that a task could ask for."""

    stages = ("control",)

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self.module: Any = load_module(spec, SD3ControlNetModel)

    @property
    def facts(self) -> Mapping[str, str | int | float | bool]:
        config = self.module.config
        return {
            "force_zeros_for_pooled_projection": bool(config.force_zeros_for_pooled_projection),
            # One that borrows its transformer's position embedding can only be beside it.
            "own_pos_embed": config.use_pos_embed is not False,
        }

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.module)

    def run(
        self, stage: str, inputs: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> Mapping[str, PortValue]:
        raise InvalidInput(
            f"a ControlNet runs within a denoiser's steps, not as {stage!r}", field="stage"
        )

    def help(
        self, part: Part, constants: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> ControlHelp:
        if part is not Part.CONTROL:
            raise InvalidInput(f"a ControlNet helps with no {part.value}", field="helper")
        if not self.facts["own_pos_embed"]:
            raise InvalidInput(
                "this ControlNet has no position embedding of its own: it runs on the node of the "
                "transformer that it borrows it from",
                field="helper",
            )
        device, config = self.module.device, self.module.config
        embeds = tensor(constants, "embeds").to(device) if "embeds" in constants else None
        pooled = tensor(constants, "pooled").to(device)
        if not constants.get("decided"):
            embeds, pooled = prompt_for(config, embeds, pooled)
        image = tensor(constants, "image").to(device, self.module.dtype)
        return ControlHelp(self.module, embeds, pooled, image)

    def unload(self) -> None:
        del self.module


@dataclass(frozen=True)
class ControlHelp:
    """Another node's lease: `embeds` (branches, T, D), `pooled` and `image` as `Conditioning`'s."""

    net: Any
    embeds: torch.Tensor | None
    pooled: torch.Tensor
    image: torch.Tensor

    def compute(self, step: PartStep) -> Sequence[torch.Tensor]:
        rows, device = self.pooled.shape[0], self.net.device
        with torch.inference_mode():
            latents = torch.cat([step.latents.to(device)] * rows)
            timestep = torch.tensor(step.timestep, dtype=torch.float32, device=device).expand(rows)
            prompt = (self.embeds, self.pooled)
            return residuals_of(self.net, latents, timestep, prompt, self.image, step.scale)


def prompt_for(
    config: Any, embeds: torch.Tensor | None, pooled: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What a ControlNet of `config` is given of a prompt. Of several, the first one's config
    decides for all, as diffusers has it."""
    zeros = config.force_zeros_for_pooled_projection
    return (
        None if config.joint_attention_dim is None else embeds,
        torch.zeros_like(pooled) if zeros else pooled,
    )


def residuals_of(
    net: Any,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    prompt: tuple[torch.Tensor | None, torch.Tensor],
    image: Any,
    scale: Any,
) -> tuple[torch.Tensor, ...]:
    """One call of a ControlNet, or of several at once."""
    return net(
        hidden_states=latents,
        timestep=timestep,
        encoder_hidden_states=prompt[0],
        pooled_projections=prompt[1],
        controlnet_cond=image,
        conditioning_scale=scale,
        return_dict=False,
    )[0]


class LentPosEmbeds:
    """A transformer's position embedding, for ControlNets that have none (SD3.5 large)."""

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer
        self._copies: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def of(self, net: Any) -> Any:
        """A copy in the ControlNet's dtype; made once for each ControlNet."""
        if net not in self._copies:
            copied = net._get_pos_embed_from_transformer(self._transformer)
            self._copies[net] = copied.to(net.dtype).to(net.device)
        return self._copies[net]
