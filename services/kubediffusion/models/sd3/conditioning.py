# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What of a request stays the same over all its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetModel, SD3MultiControlNetModel

from kubediffusion.errors import InvalidInput
from kubediffusion.models.base import Lora, Model, PortValue
from kubediffusion.models.sd3.controlnet import LentPosEmbeds, Sd3ControlNet
from kubediffusion.models.sd3.ports import number, tensor


@dataclass(frozen=True)
class Control:
    """One ControlNet of a request. `latents` (branches, C, h, w) of its image."""

    name: str
    # None: it is on another node.
    net: SD3ControlNetModel | None
    latents: torch.Tensor
    scale: float
    start: float
    end: float
    # Of a ControlNet that has none of its own and borrows the transformer's (SD3.5 large).
    pos_embed: Any = None


@dataclass(frozen=True)
class Conditioning:
    """With CFG row 0 is the negative prompt's."""

    embeds: torch.Tensor  # (branches, T, D)
    pooled: torch.Tensor  # (branches, P)
    guidance: float
    controls: tuple[Control, ...]
    multi: Any  # SD3MultiControlNetModel of several controls, or None
    loras: tuple[Lora, ...]

    @property
    def branches(self) -> int:
        return self.embeds.shape[0]


class Conditioner:
    """Reads the conditioning of requests to `transformer`."""

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer
        self._pos_embeds = LentPosEmbeds(transformer)

    def read(
        self,
        inputs: Mapping[str, PortValue],
        loras: Sequence[Lora],
        controlnets: Sequence[tuple[str, Model | None]],
    ) -> Conditioning:
        """Raises InvalidInput naming the port at fault."""
        guidance = number(inputs, "guidance")
        embeds, pooled = self._prompt(inputs, "prompt")
        if guidance > 1:
            negative, negative_pooled = self._prompt(inputs, "negative")
            embeds = torch.cat([negative, embeds], dim=0)
            pooled = torch.cat([negative_pooled, pooled], dim=0)
        controls = tuple(self._control(inputs, name, net) for name, net in controlnets)
        nets = [control.net for control in controls if control.net is not None]
        if len(controls) > 1 and controls[0].net is None:
            raise InvalidInput(
                f"of several ControlNets the first, {controls[0].name}, decides what all are "
                "given: it has to be on the denoiser's own node",
                field="helpers",
            )
        together = len(controls) > 1 and len(nets) == len(controls)
        multi = SD3MultiControlNetModel(nets) if together else None
        return Conditioning(embeds, pooled, guidance, controls, multi, tuple(loras))

    def _prompt(
        self, inputs: Mapping[str, PortValue], branch: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, T, D) and (1, P): CLIPs side by side, padded to T5's width, T5 behind them.

        In the transformer's dtype: encoders may have others, each its own.
        """
        device, dtype = self._transformer.device, self._transformer.dtype
        clips = [tensor(inputs, f"{branch}_{i}.embeds").to(device, dtype) for i in (1, 2)]
        pooled = [tensor(inputs, f"{branch}_{i}.pooled").to(device, dtype) for i in (1, 2)]
        clip = torch.cat(clips, dim=-1)
        port = f"{branch}_3.embeds"
        if port in inputs:
            t5 = tensor(inputs, port).to(device, dtype)
        else:
            length = int(number(inputs, "max_sequence_length"))
            width = self._transformer.config.joint_attention_dim
            t5 = torch.zeros((1, length, width), device=device, dtype=dtype)
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], dim=-2), torch.cat(pooled, dim=-1)

    def _control(self, inputs: Mapping[str, PortValue], name: str, model: Model | None) -> Control:
        if not isinstance(model, Sd3ControlNet | None):
            raise InvalidInput(f"{name} is no ControlNet", field=f"control.{name}")
        prefix, net = f"control.{name}", None if model is None else model.module
        latents, borrows = tensor(inputs, f"{prefix}.latents"), False
        if net is not None:
            latents = latents.to(self._transformer.device, net.dtype)
            borrows = net.config.use_pos_embed is False
        return Control(
            name,
            net,
            latents,
            number(inputs, f"{prefix}.scale", 1.0),
            number(inputs, f"{prefix}.start", 0.0),
            number(inputs, f"{prefix}.end", 1.0),
            self._pos_embeds.of(net) if borrows else None,
        )
