# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for models: the same stages and contract, and no arithmetic to speak of.

They measure what the service itself costs, and let faults be tried a thousand times a minute.
Their option ``step_seconds`` makes a step take that long. The picture depends on the seed, the
prompts and every single step, so that a step lost or done twice shows in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from math import inf
from time import sleep

import numpy as np
import torch

from kubediffusion.errors import InvalidInput
from kubediffusion.models.base import (
    CheckpointState,
    Family,
    LoadSpec,
    Lora,
    Model,
    PortValue,
    StepCache,
)

WIDTH = 8
SIDE = 8
_MODULUS = 2**31 - 1


class Standin:
    """One-shot stages."""

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self._seconds = _option(spec, "step_seconds", 0.0)

    @property
    def stages(self) -> tuple[str, ...]:
        return _STAGES[self.spec.component]

    @property
    def facts(self) -> Mapping[str, str | int | float | bool]:
        return _FACTS.get(self.spec.component, {})

    @property
    def nbytes(self) -> int:
        return int(_option(self.spec, "nbytes", 1024))

    def run(
        self, stage: str, inputs: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> Mapping[str, PortValue]:
        if self._seconds:
            sleep(self._seconds)
        if stage == "encode":
            return self._encode(inputs)
        if stage == "encode_image":
            data = inputs.get("image")
            if not isinstance(data, bytes):
                raise InvalidInput("it must be an encoded image", field="image")
            generator = torch.Generator().manual_seed(_digest(data))
            return {"latents": _number(_digest(data)), "generator": generator.get_state()}
        if stage == "decode":
            return {"image": _picture(int(_tensor(inputs, "latents").item()))}
        raise InvalidInput(f"a stand-in has no stage {stage!r}", field="stage")

    def unload(self) -> None:
        pass

    def _encode(self, inputs: Mapping[str, PortValue]) -> Mapping[str, PortValue]:
        text = inputs.get("text")
        if not isinstance(text, str):
            raise InvalidInput("it must be a text", field="text")
        return {"embeds": _number(_digest(text.encode())), "pooled": _POOLED}


class StandinDenoising:
    """Its state is one number, which each step mixes with the step's own."""

    def __init__(self, state: int, total_steps: int, step: int = 0) -> None:
        self.state = state
        self._total = total_steps
        self._step = step

    @property
    def step(self) -> int:
        return self._step

    @property
    def total_steps(self) -> int:
        return self._total

    def advance(self) -> None:
        self._step += 1
        self.state = (self.state * 48271 + self._step) % _MODULUS

    def checkpoint(self) -> CheckpointState:
        return CheckpointState(self._step, self._total, {"latents": torch.tensor([self.state])})

    def preview(self) -> np.ndarray:
        return _picture(self.state)

    def finish(self) -> Mapping[str, PortValue]:
        return {"latents": _number(self.state)}


class StandinDenoiser(Standin):
    def start(
        self,
        inputs: Mapping[str, PortValue],
        loras: Sequence[Lora] = (),
        resume: CheckpointState | None = None,
        controlnets: Sequence[tuple[str, Model]] = (),
        budget: float | None = None,
        step_cache: StepCache | None = None,
    ) -> StandinDenoising:
        steps = inputs.get("steps")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise InvalidInput("it must be a whole number above 0", field="steps")
        if resume is not None:
            state = int(resume.tensors["latents"].item())
            return StandinDenoising(state, resume.total_steps, resume.step)
        state = 0
        for name in sorted(inputs):
            value = inputs[name]
            if isinstance(value, torch.Tensor | np.ndarray):
                value = value.sum().item()
            state = (state * 31 + _digest(f"{name}={value!r}".encode())) % _MODULUS
        if budget is not None:
            state = (state * 31 + _digest(f"budget={budget}".encode())) % _MODULUS
        for lora in loras:
            state = (state * 31 + _digest(f"{lora.name}={lora.scale}".encode())) % _MODULUS
        return StandinDenoising(state, steps)

    def batch_key(self, denoising: object) -> object:
        return "standin"

    def advance(self, batch: Sequence[StandinDenoising]) -> None:
        if self._seconds:
            sleep(self._seconds)
        for denoising in batch:
            denoising.advance()


def _option(spec: LoadSpec, name: str, default: float) -> float:
    try:
        value = float(spec.options.get(name, default))
    except ValueError:
        value = -1.0
    if not 0 <= value < inf:
        raise InvalidInput(
            f"{spec.options[name]!r} must be a number, 0 or more", field=f"options.{name}"
        )
    return value


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "little") % _MODULUS


def _number(value: int) -> np.ndarray:
    return np.array([value], np.int64)


def _tensor(inputs: Mapping[str, PortValue], name: str) -> torch.Tensor | np.ndarray:
    value = inputs.get(name)
    if not isinstance(value, torch.Tensor | np.ndarray):
        raise InvalidInput("it must be a tensor", field=name)
    return value


def _picture(state: int) -> np.ndarray:
    return np.random.default_rng(state).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


_POOLED = np.zeros((1, WIDTH), np.float32)
_STAGES = {
    "text_encoder": ("encode",),
    "text_encoder_2": ("encode",),
    "text_encoder_3": ("encode",),
    "transformer": ("denoise",),
    "vae": ("encode_image", "decode"),
    "controlnet": ("control",),
}
_FACTS: dict[str, dict[str, str | int | float | bool]] = {
    "vae": {"vae_scale_factor": 1, "latent_channels": 1},
    "transformer": {"patch_size": 1, "sample_size": SIDE, "pos_embed_max_size": 4096},
    "controlnet": {"force_zeros_for_pooled_projection": False},
}


def _load(spec: LoadSpec) -> Model:
    return StandinDenoiser(spec) if spec.component == "transformer" else Standin(spec)


STANDIN = Family("standin", tuple(_STAGES), _load)
