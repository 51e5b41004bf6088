# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5: the transformer, a step at a time, and its ControlNets.

The arithmetic and its order are those of diffusers' StableDiffusion3Pipeline and its
image-to-image and ControlNet siblings; what this file adds is that the loop's state lives in a
`Sd3Denoising`, can be stopped between any two steps, and goes on elsewhere with the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetModel, SD3MultiControlNetModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor

from kubediffusion.errors import InvalidInput, UnsupportedModel
from kubediffusion.models.autoencoder import Autoencoder
from kubediffusion.models.base import CheckpointState, Family, LoadSpec, Lora, Model, PortValue
from kubediffusion.models.loading import load_module, nbytes_of
from kubediffusion.models.lora import Adapters
from kubediffusion.models.preview import picture_of
from kubediffusion.models.random import generator_of, state_of
from kubediffusion.models.text import ClipEncoder, T5Encoder


@dataclass(frozen=True)
class Control:
    """One ControlNet of a request. `latents` (branches, C, h, w) of its image."""

    net: SD3ControlNetModel
    latents: torch.Tensor
    scale: float
    start: float
    end: float
    # Of a ControlNet that has none of its own and borrows the transformer's (SD3.5 large).
    pos_embed: Any = None


@dataclass(frozen=True)
class Conditioning:
    """What stays the same over all steps. With CFG row 0 is the negative prompt's."""

    embeds: torch.Tensor  # (branches, T, D)
    pooled: torch.Tensor  # (branches, P)
    guidance: float
    controls: tuple[Control, ...]
    multi: Any  # SD3MultiControlNetModel of several controls, or None
    loras: tuple[Lora, ...]

    @property
    def branches(self) -> int:
        return self.embeds.shape[0]


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
        return {"latents": self.latents}

    def apply(self, velocity: torch.Tensor) -> None:
        """One step of the sampler, from the model's guided output (1, C, h, w)."""
        dtype = self.latents.dtype
        self._last = (self.latents, velocity, self.timestep)
        self.latents = self.scheduler.step(
            velocity, self.timestep, self.latents, generator=self.generator, return_dict=False
        )[0]
        self.latents = self.latents.to(dtype)
        self._step += 1


class Sd3Transformer:
    """The denoiser: `models.base.Model` and `Denoiser`."""

    stages = ("denoise",)

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self._module: Any = load_module(spec, SD3Transformer2DModel)
        self._adapters = Adapters(self._module, "transformer")
        self._scheduler_config = _scheduler_config(spec)
        self._vae_scale_factor = _vae_scale_factor(spec)
        self._pos_embeds: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    @property
    def facts(self) -> Mapping[str, str | int | float | bool]:
        names = ("patch_size", "sample_size", "in_channels")
        names += ("pos_embed_max_size", "joint_attention_dim")
        return {name: int(self._module.config[name]) for name in names}

    @property
    def nbytes(self) -> int:
        return nbytes_of(self._module)

    def run(
        self, stage: str, inputs: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> Mapping[str, PortValue]:
        raise InvalidInput(f"a transformer has no one-shot stage {stage!r}", field="stage")

    def unload(self) -> None:
        del self._module, self._adapters

    def start(
        self,
        inputs: Mapping[str, PortValue],
        loras: Sequence[Lora] = (),
        resume: CheckpointState | None = None,
        controlnets: Sequence[tuple[str, Model]] = (),
    ) -> Sd3Denoising:
        """Raises InvalidInput naming the port at fault."""
        with torch.inference_mode():
            conditioning = self._conditioning(inputs, loras, controlnets)
            scheduler, timesteps = self._schedule(inputs)
            if resume is not None:
                return _resumed(conditioning, scheduler, timesteps, resume, self._module.device)
            given = inputs.get("init.generator")
            generator = generator_of(given if given is not None else inputs.get("seed"))
            latents = self._first_latents(inputs, scheduler, timesteps, generator)
            # diffusers' sampler draws from the global generator, if at all: decision 0001.
            sampler = generator_of(inputs.get("seed"))
            return Sd3Denoising(conditioning, scheduler, timesteps, latents, sampler)

    def batch_key(self, denoising: Any) -> object:
        """Equal keys share a forward. ControlNets have one scale a call: such leases go alone."""
        c = denoising.conditioning
        if c.controls:
            return denoising
        loras = tuple((lora.path, lora.weight_name, lora.scale) for lora in c.loras)
        return (c.embeds.shape, denoising.latents.shape, denoising.latents.dtype, loras)

    def advance(self, batch: Sequence[Any]) -> None:
        self._adapters.use(batch[0].conditioning.loras)
        with torch.inference_mode():
            if len(batch) == 1:
                batch[0].apply(self._velocity(batch[0]))
            else:
                self._advance_together(batch)

    # ------------------------------------------------------------ one request

    def _velocity(self, denoising: Sd3Denoising) -> torch.Tensor:
        c = denoising.conditioning
        latents = torch.cat([denoising.latents] * c.branches)
        timestep = denoising.timestep.expand(c.branches)
        out = self._module(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=c.embeds,
            pooled_projections=c.pooled,
            block_controlnet_hidden_states=_residuals(denoising, latents, timestep),
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

    # ------------------------------------------------------------ before the first step

    def _conditioning(
        self,
        inputs: Mapping[str, PortValue],
        loras: Sequence[Lora],
        controlnets: Sequence[tuple[str, Model]],
    ) -> Conditioning:
        guidance = _number(inputs, "guidance")
        embeds, pooled = self._prompt(inputs, "prompt")
        if guidance > 1:
            negative, negative_pooled = self._prompt(inputs, "negative")
            embeds = torch.cat([negative, embeds], dim=0)
            pooled = torch.cat([negative_pooled, pooled], dim=0)
        controls = tuple(self._control(inputs, name, net) for name, net in controlnets)
        multi = SD3MultiControlNetModel([c.net for c in controls]) if len(controls) > 1 else None
        return Conditioning(embeds, pooled, guidance, controls, multi, tuple(loras))

    def _prompt(
        self, inputs: Mapping[str, PortValue], branch: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, T, D) and (1, P): CLIPs side by side, padded to T5's width, T5 behind them."""
        device = self._module.device
        clips = [_tensor(inputs, f"{branch}_{i}.embeds").to(device) for i in (1, 2)]
        pooled = [_tensor(inputs, f"{branch}_{i}.pooled").to(device) for i in (1, 2)]
        clip = torch.cat(clips, dim=-1)
        port = f"{branch}_3.embeds"
        if port in inputs:
            t5 = _tensor(inputs, port).to(device)
        else:
            length = int(_number(inputs, "max_sequence_length"))
            width = self._module.config.joint_attention_dim
            t5 = torch.zeros((1, length, width), device=device, dtype=clip.dtype)
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], dim=-2), torch.cat(pooled, dim=-1)

    def _control(self, inputs: Mapping[str, PortValue], name: str, model: Model) -> Control:
        if not isinstance(model, Sd3ControlNet):
            raise InvalidInput(f"{name} is no ControlNet", field=f"control.{name}")
        prefix, net = f"control.{name}", model.module
        return Control(
            net,
            _tensor(inputs, f"{prefix}.latents").to(self._module.device),
            _number(inputs, f"{prefix}.scale", 1.0),
            _number(inputs, f"{prefix}.start", 0.0),
            _number(inputs, f"{prefix}.end", 1.0),
            self._lent_pos_embed(net) if net.config.use_pos_embed is False else None,
        )

    def _lent_pos_embed(self, net: Any) -> Any:
        """A copy of the transformer's, in the ControlNet's dtype; made once for each ControlNet."""
        if net not in self._pos_embeds:
            copied = net._get_pos_embed_from_transformer(self._module)
            self._pos_embeds[net] = copied.to(net.dtype).to(net.device)
        return self._pos_embeds[net]

    def _schedule(self, inputs: Mapping[str, PortValue]) -> tuple[Any, torch.Tensor]:
        """A scheduler of the request's own, and the timesteps that are left after `strength`."""
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(self._scheduler_config)
        steps = int(_number(inputs, "steps"))
        shift: dict[str, float] = {}
        if scheduler.config.get("use_dynamic_shifting"):
            shape = self._latent_shape(inputs)
            patch = self._module.config.patch_size
            config = scheduler.config
            shift["mu"] = calculate_shift(
                (shape[2] // patch) * (shape[3] // patch),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
        scheduler.set_timesteps(steps, device=self._module.device, **shift)
        timesteps = scheduler.timesteps
        if "init.latents" in inputs:
            strength = _number(inputs, "strength")
            first = int(max(steps - min(steps * strength, steps), 0))
            timesteps = timesteps[first * scheduler.order :]
            scheduler.set_begin_index(first * scheduler.order)
        if len(timesteps) < 1:
            raise InvalidInput("it leaves no step to run; raise it", field="strength")
        return scheduler, timesteps

    def _latent_shape(self, inputs: Mapping[str, PortValue]) -> tuple[int, int, int, int]:
        height, width = int(_number(inputs, "height")), int(_number(inputs, "width"))
        factor = self._vae_scale_factor
        return (1, self._module.config.in_channels, height // factor, width // factor)

    def _first_latents(
        self,
        inputs: Mapping[str, PortValue],
        scheduler: Any,
        timesteps: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        device, dtype = self._module.device, _tensor(inputs, "prompt_1.embeds").dtype
        if "init.latents" not in inputs:
            shape = self._latent_shape(inputs)
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        init = _tensor(inputs, "init.latents").to(device)
        noise = randn_tensor(init.shape, generator=generator, device=device, dtype=dtype)
        init = scheduler.scale_noise(init, timesteps[:1].repeat(1), noise)
        return init.to(device=device, dtype=dtype)


class Sd3ControlNet:
    """A ControlNet, called by the denoiser beside it at each step."""

    stages = ("control",)

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self.module: Any = load_module(spec, SD3ControlNetModel)

    @property
    def facts(self) -> Mapping[str, str | int | float | bool]:
        zeros = bool(self.module.config.force_zeros_for_pooled_projection)
        return {"force_zeros_for_pooled_projection": zeros}

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.module)

    def run(
        self, stage: str, inputs: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> Mapping[str, PortValue]:
        raise InvalidInput(
            f"a ControlNet runs within a denoiser's steps, not as {stage!r}", field="stage"
        )

    def unload(self) -> None:
        del self.module


def _residuals(
    denoising: Sd3Denoising, latents: torch.Tensor, timestep: torch.Tensor
) -> tuple[torch.Tensor, ...] | None:
    """What the ControlNets add to the transformer's blocks at this step.

    Of several, the first one's config decides for all, and they run even where their scale is 0:
    both as diffusers does.
    """
    c = denoising.conditioning
    if not c.controls:
        return None
    config: Any = c.controls[0].net.config
    zeros = config.force_zeros_for_pooled_projection
    done, total = denoising.step, denoising.total_steps
    scales = [
        control.scale
        * (1.0 - float(done / total < control.start or (done + 1) / total > control.end))
        for control in c.controls
    ]
    images = [control.latents for control in c.controls]
    for control in c.controls:
        if control.pos_embed is not None:
            # Another transformer's lease may have lent its own since the last step.
            control.net.pos_embed = control.pos_embed
    return (c.multi or c.controls[0].net)(
        hidden_states=latents,
        timestep=timestep,
        encoder_hidden_states=None if config.joint_attention_dim is None else c.embeds,
        pooled_projections=torch.zeros_like(c.pooled) if zeros else c.pooled,
        controlnet_cond=images if c.multi else images[0],
        conditioning_scale=scales if c.multi else scales[0],
        return_dict=False,
    )[0]


def _resumed(
    conditioning: Conditioning,
    scheduler: Any,
    timesteps: torch.Tensor,
    state: CheckpointState,
    device: Any,
) -> Sd3Denoising:
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


def _number(inputs: Mapping[str, PortValue], name: str, default: float | None = None) -> float:
    value = inputs.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInput("it must be a number", field=name)
    return value


def _tensor(inputs: Mapping[str, PortValue], name: str) -> torch.Tensor:
    value = inputs.get(name)
    if not isinstance(value, torch.Tensor):
        raise InvalidInput("stage 'denoise' takes a tensor here", field=name)
    return value


_LOADERS: dict[str, Any] = {
    "text_encoder": ClipEncoder,
    "text_encoder_2": ClipEncoder,
    "text_encoder_3": T5Encoder,
    "transformer": Sd3Transformer,
    "vae": Autoencoder,
    "controlnet": Sd3ControlNet,
}


def _load(spec: LoadSpec) -> Model:
    return _LOADERS[spec.component](spec)


SD3 = Family("sd3", tuple(_LOADERS), _load)
