# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A step in parts, some of which another node computes: one branch of guidance, a ControlNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch

from kubediffusion.errors import InvalidInput
from kubediffusion.models.base import Part, PartStep, PortValue
from kubediffusion.models.sd3.conditioning import Conditioning, Control
from kubediffusion.models.sd3.controlnet import prompt_for, residuals_of
from kubediffusion.models.sd3.denoising import Sd3Denoising

# By the name of the ControlNet that made them, elsewhere.
Residuals: TypeAlias = Mapping[str, Sequence[torch.Tensor]]
NONE: Residuals = MappingProxyType({})


@dataclass(frozen=True)
class BranchHelp:
    """The negative prompt's half of another node's lease."""

    velocity: Callable[[PartStep], torch.Tensor]

    def compute(self, step: PartStep) -> Sequence[torch.Tensor]:
        return [self.velocity(step)]


def constants(denoising: Sd3Denoising, part: Part, name: str) -> Mapping[str, PortValue]:
    """What a helper needs of all steps. Raises InvalidInput."""
    c = denoising.conditioning
    if part is Part.CONTROL:
        return _control_constants(c, _control(denoising, name))
    if c.branches != 2:
        raise InvalidInput("without guidance there is no branch to divide", field="helpers")
    if c.controls:
        raise InvalidInput("a lease with ControlNets keeps both its branches", field="helpers")
    if denoising.pruning.request is not None:
        raise InvalidInput("a pruned lease keeps both its branches on one node", field="helpers")
    if denoising.step_cache is not None:
        raise InvalidInput("a step cache is of both branches, on one node", field="helpers")
    return {"embeds": c.embeds[:1], "pooled": c.pooled[:1]}


def _control_constants(c: Conditioning, control: Control) -> Mapping[str, PortValue]:
    if len(c.controls) == 1:  # it knows itself what it takes of the prompt
        return {"embeds": c.embeds, "pooled": c.pooled, "image": control.latents}
    embeds, pooled = prompt_for(_present(c.controls[0]).config, c.embeds, c.pooled)
    given: dict[str, PortValue] = {"pooled": pooled, "image": control.latents, "decided": True}
    return given if embeds is None else given | {"embeds": embeds}


def part_step(denoising: Sd3Denoising, part: Part, name: str) -> PartStep:
    scale = _scale(denoising, _control(denoising, name)) if part is Part.CONTROL else 1.0
    timestep = float(denoising.timestep.item())
    return PartStep(denoising.step, timestep, denoising.latents, scale)


def residuals(
    denoising: Sd3Denoising, latents: torch.Tensor, timestep: torch.Tensor, given: Residuals
) -> tuple[torch.Tensor, ...] | None:
    """What the ControlNets add to the transformer's blocks at this step.

    Of several, the first one's config decides for all, and they run even where their scale is 0:
    both as diffusers does. Those `given` are summed with the others in the workflow's order.
    """
    c = denoising.conditioning
    if not c.controls:
        return None
    for control in c.controls:
        if control.net is not None and control.pos_embed is not None:
            # Another transformer's lease may have lent its own since the last step.
            control.net.pos_embed = control.pos_embed
    if c.multi and not given:
        nets: Any = c.multi
        images = [control.latents for control in c.controls]
        scales = [_scale(denoising, control) for control in c.controls]
        prompt = prompt_for(_present(c.controls[0]).config, c.embeds, c.pooled)
        return residuals_of(nets, latents, timestep, prompt, images, scales)
    total: tuple[torch.Tensor, ...] | None = None
    for control in c.controls:
        one = given.get(control.name)
        if one is None:
            net = _present(control)
            prompt = prompt_for(_present(c.controls[0]).config, c.embeds, c.pooled)
            scale = _scale(denoising, control)
            one = residuals_of(net, latents, timestep, prompt, control.latents, scale)
        total = tuple(one) if total is None else _sums(total, one)
    return total


def _sums(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """As diffusers has it, as many as the ControlNet with the fewest has."""
    return tuple(one + other for one, other in zip(a, b, strict=False))


def _present(control: Control) -> Any:
    if control.net is None:
        raise InvalidInput(f"ControlNet {control.name} is not on this node", field="helpers")
    return control.net


def _control(denoising: Sd3Denoising, name: str) -> Control:
    return next(c for c in denoising.conditioning.controls if c.name == name)


def _scale(denoising: Sd3Denoising, control: Control) -> float:
    done, total = denoising.step, denoising.total_steps
    outside = done / total < control.start or (done + 1) / total > control.end
    return control.scale * (1.0 - float(outside))
