# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The denoiser: a step of one request, or of several together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from kubediffusion.errors import InvalidInput
from kubediffusion.models.base import (
    CheckpointState,
    Helping,
    LoadSpec,
    Lora,
    Measures,
    Model,
    Part,
    PartStep,
    PortValue,
    StepCache,
)
from kubediffusion.models.caching import LateResiduals, LeaseCache, StepCaches, lease_cache
from kubediffusion.models.loading import load_module, nbytes_of
from kubediffusion.models.lora import Adapters
from kubediffusion.models.pruning import LeasePruning, Pruning
from kubediffusion.models.random import generator_of
from kubediffusion.models.sd3 import parts
from kubediffusion.models.sd3.conditioning import Conditioner
from kubediffusion.models.sd3.denoising import Sd3Denoising, resumed
from kubediffusion.models.sd3.ports import tensor
from kubediffusion.models.sd3.sampling import Sampling


class Sd3Transformer:
    """`models.base.Model` and `Denoiser`."""

    stages = ("denoise",)

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self._module: Any = load_module(spec, SD3Transformer2DModel)
        self._pruning = Pruning(spec, self._module)  # before LoRAs
        self._caches = StepCaches(self._module)
        self._adapters = Adapters(self._module, "transformer")
        self._conditioner = Conditioner(self._module)
        self._sampling = Sampling(spec, self._module)

    @property
    def facts(self) -> Mapping[str, str | int | float | bool]:
        names = ("patch_size", "sample_size", "in_channels")
        names += ("pos_embed_max_size", "joint_attention_dim")
        own = {name: int(self._module.config[name]) for name in names}
        return {**own, **self._pruning.facts}

    @property
    def measures(self) -> Measures:
        return replace(self._pruning.measures, steps_reused=self._caches.steps_reused)

    @property
    def nbytes(self) -> int:
        return nbytes_of(self._module) + self._pruning.nbytes

    def run(
        self, stage: str, inputs: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> Mapping[str, PortValue]:
        raise InvalidInput(f"a transformer has no one-shot stage {stage!r}", field="stage")

    def unload(self) -> None:
        del self._module, self._adapters, self._conditioner, self._pruning, self._caches

    def start(
        self,
        inputs: Mapping[str, PortValue],
        loras: Sequence[Lora] = (),
        resume: CheckpointState | None = None,
        controlnets: Sequence[tuple[str, Model | None]] = (),
        budget: float | None = None,
        step_cache: StepCache | None = None,
    ) -> Sd3Denoising:
        """Raises InvalidInput naming the port at fault."""
        with torch.inference_mode():
            conditioning = self._conditioner.read(inputs, loras, controlnets)
            scheduler, timesteps = self._sampling.schedule(inputs)
            if resume is not None:
                denoising = resumed(conditioning, scheduler, timesteps, resume, self._module.device)
            else:
                given = inputs.get("init.generator")
                generator = generator_of(given if given is not None else inputs.get("seed"))
                latents = self._sampling.first_latents(inputs, scheduler, timesteps, generator)
                # diffusers' sampler draws from the global generator, if at all: decision 0001.
                sampler = generator_of(inputs.get("seed"))
                denoising = Sd3Denoising(conditioning, scheduler, timesteps, latents, sampler)
            denoising.pruning = self._prune(denoising, budget)
            if step_cache is not None:
                grid = len(denoising.sigmas)
                first = grid - denoising.total_steps + denoising.step
                denoising.step_cache = lease_cache(step_cache, grid=grid, first_step=first)
            return denoising

    def _prune(self, denoising: Sd3Denoising, budget: float | None) -> LeasePruning:
        height, width = denoising.latents.shape[-2:]
        patch = self._module.config.patch_size
        return self._pruning.of(
            budget,
            sigmas=denoising.sigmas,
            tokens=(height // patch) * (width // patch),
            guided=denoising.conditioning.branches == 2,
        )

    def batch_key(self, denoising: Any) -> object:
        """Equal keys share a forward. ControlNets have one scale a call, and a step cache reuses
        for one request: such leases go alone. Pruned ones share where both keep as many tokens in
        each block."""
        c = denoising.conditioning
        if c.controls or denoising.step_cache is not None:
            return denoising
        loras = tuple((lora.path, lora.weight_name, lora.scale) for lora in c.loras)
        row = None
        if denoising.step < denoising.total_steps:
            row = denoising.pruning.row(denoising.sigma)
        return (c.embeds.shape, denoising.latents.shape, denoising.latents.dtype, loras, row)

    def advance(self, batch: Sequence[Any]) -> None:
        self._adapters.use(batch[0].conditioning.loras)
        members = [(denoising.pruning, denoising.sigma) for denoising in batch]
        cache: LeaseCache | None = batch[0].step_cache
        with torch.inference_mode(), self._caches.step(cache), self._pruning.step(members):
            if len(batch) == 1:
                batch[0].apply(self._velocity(batch[0]))
            else:
                self._advance_together(batch)
        self._pruning.count(members, computed=cache is None or not cache.reuses)

    # ------------------------------------------------------------ one request

    def _velocity(
        self, denoising: Sd3Denoising, residuals: parts.Residuals = parts.NONE
    ) -> torch.Tensor:
        c = denoising.conditioning
        latents = torch.cat([denoising.latents] * c.branches)
        timestep = denoising.timestep.expand(c.branches)
        out = self._module(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=c.embeds,
            pooled_projections=c.pooled,
            block_controlnet_hidden_states=_added(denoising, latents, timestep, residuals),
            return_dict=False,
        )[0]
        if c.branches == 1:
            return out
        negative, positive = out.chunk(2)
        return negative + c.guidance * (positive - negative)

    def _advance_together(self, batch: Sequence[Sd3Denoising]) -> None:
        """Rows: the negative prompts of all, then the prompts of all."""
        all_c = [d.conditioning for d in batch]
        branches = all_c[0].branches
        rows = [(b, d) for b in range(branches) for d in batch]
        out = self._module(
            hidden_states=torch.cat([d.latents for _, d in rows]),
            timestep=torch.stack([d.timestep for _, d in rows]),
            encoder_hidden_states=torch.stack([d.conditioning.embeds[b] for b, d in rows]),
            pooled_projections=torch.stack([d.conditioning.pooled[b] for b, d in rows]),
            return_dict=False,
        )[0]
        if branches == 2:
            negative, positive = out.chunk(2)
            scales = torch.tensor([c.guidance for c in all_c], dtype=out.dtype, device=out.device)
            out = negative + scales.view(-1, 1, 1, 1) * (positive - negative)
        for denoising, velocity in zip(batch, out.split(1), strict=True):
            denoising.apply(velocity)

    # ------------------------------------------------------------ a step in parts

    def constants(self, denoising: Any, part: Part, name: str) -> Mapping[str, PortValue]:
        return parts.constants(denoising, part, name)

    def part_step(self, denoising: Any, part: Part, name: str) -> PartStep:
        return parts.part_step(denoising, part, name)

    def own(self, denoising: Any) -> None:
        denoising.own = self._row(denoising, 1)

    def assemble(
        self, denoising: Any, given: Mapping[tuple[Part, str], Sequence[torch.Tensor]]
    ) -> None:
        branch, device = given.get((Part.BRANCH, "")), self._module.device
        if branch is None and denoising.own is None:
            residuals = {
                name: [each.to(device) for each in values]
                for (part, name), values in given.items()
                if part is Part.CONTROL
            }
            self._adapters.use(denoising.conditioning.loras)
            member = (denoising.pruning, denoising.sigma)
            cache: LeaseCache | None = denoising.step_cache
            with torch.inference_mode(), self._caches.step(cache), self._pruning.step([member]):
                denoising.apply(self._velocity(denoising, residuals))
            self._pruning.count([member], computed=cache is None or not cache.reuses)
            return
        negative = self._row(denoising, 0) if branch is None else branch[0].to(device)
        positive = self._row(denoising, 1) if denoising.own is None else denoising.own
        with torch.inference_mode():
            guidance = denoising.conditioning.guidance
            denoising.apply(negative + guidance * (positive - negative))

    def help(
        self, part: Part, constants: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> Helping:
        if part is not Part.BRANCH:
            raise InvalidInput(f"a transformer helps with no {part.value}", field="helper")
        device = self._module.device
        embeds = tensor(constants, "embeds").to(device)
        pooled = tensor(constants, "pooled").to(device)

        def velocity(step: PartStep) -> torch.Tensor:
            timestep = torch.tensor(step.timestep, dtype=torch.float32, device=device)
            return self._branch(step.latents.to(device), timestep, embeds, pooled, loras)

        return parts.BranchHelp(velocity)

    def _row(self, denoising: Sd3Denoising, row: int) -> torch.Tensor:
        """One branch alone: 0 is the negative prompt's, 1 the prompt's."""
        c = denoising.conditioning
        embeds, pooled = c.embeds[row : row + 1], c.pooled[row : row + 1]
        return self._branch(denoising.latents, denoising.timestep, embeds, pooled, c.loras)

    def _branch(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        embeds: torch.Tensor,
        pooled: torch.Tensor,
        loras: Sequence[Lora],
    ) -> torch.Tensor:
        """The velocity (1, C, h, w) of one prompt; `timestep` has no dimension."""
        self._adapters.use(loras)
        with torch.inference_mode(), self._caches.step(None), self._pruning.step([]):
            return self._module(
                hidden_states=latents,
                timestep=timestep.expand(1),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                return_dict=False,
            )[0]


def _added(
    denoising: Sd3Denoising,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    given: parts.Residuals,
) -> Any:
    """The residuals of the request's ControlNets; of a lease with a step cache, when asked for."""

    def residuals() -> tuple[torch.Tensor, ...] | None:
        return parts.residuals(denoising, latents, timestep, given)

    controls, cache = denoising.conditioning.controls, denoising.step_cache
    if not controls or cache is None:
        return residuals()
    elsewhere, net = given.get(controls[0].name), cast("Any", controls[0].net)
    count = len(net.controlnet_blocks) if elsewhere is None else len(elsewhere)
    return LateResiduals(count, cache, lambda: residuals() or ())
