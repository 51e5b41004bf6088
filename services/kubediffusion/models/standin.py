# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for models: the same stages and contract, and no arithmetic to speak of.

They measure what the service itself costs, and let faults be tried a thousand times a minute.
Their option ``step_seconds`` makes a step take that long, half of it for each branch. The picture
depends on the seed, the prompts, every single step and both its branches, and on the order of
ControlNets' residuals, so that any of these lost or done twice shows in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from time import sleep

import numpy as np
import torch

from kubediffusion.errors import InvalidInput
from kubediffusion.models.base import (
    CheckpointState,
    Family,
    Helping,
    LoadSpec,
    Lora,
    Model,
    Part,
    PartStep,
    PortValue,
    StepCache,
)

WIDTH = 8
SIDE = 8
# Of a ControlNet, at each step.
RESIDUALS = 3
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


@dataclass(frozen=True)
class StandinPart:
    """A branch or a ControlNet's residuals, from what they depend on; takes `seconds`."""

    key: int
    values: int
    seconds: float = 0.0

    def at(self, state: int, step: int) -> list[int]:
        return [(state * 69621 + self.key + step * 31 + i) % _MODULUS for i in range(self.values)]

    def compute(self, step: PartStep) -> Sequence[torch.Tensor]:
        if self.seconds:
            sleep(self.seconds)
        return [torch.tensor([each]) for each in self.at(int(step.latents.item()), step.step)]


class StandinDenoising:
    """Its state is one number, which each step mixes with its branches and residuals."""

    def __init__(
        self,
        state: int,
        total_steps: int,
        branch: StandinPart,
        controls: Mapping[str, StandinPart],
        resident: frozenset[str],
        step: int = 0,
    ) -> None:
        self.state = state
        self.branch = branch
        # In the workflow's order; the names of those that are here.
        self.controls = controls
        self.resident = resident
        self.own: int | None = None
        self._total = total_steps
        self._step = step

    @property
    def step(self) -> int:
        return self._step

    @property
    def total_steps(self) -> int:
        return self._total

    def part_step(self) -> PartStep:
        return PartStep(self._step, float(self._step), torch.tensor([self.state]))

    def advance(self, parts: Mapping[tuple[Part, str], Sequence[int]]) -> None:
        """The parts that are not given are computed."""
        negative = parts.get((Part.BRANCH, "")) or self.branch.at(self.state, self._step)
        state = (self.state * 48271 if self.own is None else self.own) + negative[0]
        for name, control in self.controls.items():
            for residual in parts.get((Part.CONTROL, name)) or control.at(self.state, self._step):
                state = (state * 31 + residual) % _MODULUS
        self.own = None
        self._step += 1
        self.state = (state + self._step) % _MODULUS

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
        controlnets: Sequence[tuple[str, Model | None]] = (),
        budget: float | None = None,
        step_cache: StepCache | None = None,
    ) -> StandinDenoising:
        steps = inputs.get("steps")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise InvalidInput("it must be a whole number above 0", field="steps")
        controls = {
            name: StandinPart(_digest(f"control.{name}".encode()), RESIDUALS)
            for name, _ in controlnets
        }
        resident = frozenset(name for name, model in controlnets if model is not None)
        negative = sorted((n, v) for n, v in inputs.items() if n.startswith("negative"))
        branch = StandinPart(_mixed(0, negative), 1)
        state = _mixed(0, sorted(inputs.items()))
        if budget is not None:
            state = _mixed(state, [("budget", budget)])
        state = _mixed(state, [(lora.name, lora.scale) for lora in loras])
        if resume is None:
            return StandinDenoising(state, steps, branch, controls, resident)
        state = int(resume.tensors["latents"].item())
        total = resume.total_steps
        return StandinDenoising(state, total, branch, controls, resident, resume.step)

    def batch_key(self, denoising: object) -> object:
        return "standin"

    def advance(self, batch: Sequence[StandinDenoising]) -> None:
        self._wait(1.0)
        for denoising in batch:
            denoising.advance({})

    # ------------------------------------------------------------ in parts

    def constants(
        self, denoising: StandinDenoising, part: Part, name: str
    ) -> Mapping[str, PortValue]:
        found = denoising.branch if part is Part.BRANCH else denoising.controls[name]
        return {"key": found.key}

    def part_step(self, denoising: StandinDenoising, part: Part, name: str) -> PartStep:
        return denoising.part_step()

    def own(self, denoising: StandinDenoising) -> None:
        self._wait(0.5)
        denoising.own = denoising.state * 48271

    def assemble(
        self,
        denoising: StandinDenoising,
        parts: Mapping[tuple[Part, str], Sequence[torch.Tensor]],
    ) -> None:
        if denoising.own is None:
            self._wait(0.5)
        if (Part.BRANCH, "") not in parts:
            self._wait(0.5)
        missing = [
            name
            for name in denoising.controls
            if name not in denoising.resident and (Part.CONTROL, name) not in parts
        ]
        if missing:
            raise InvalidInput(f"ControlNet {missing[0]} is not here", field="helpers")
        denoising.advance(
            {part: [int(value.item()) for value in values] for part, values in parts.items()}
        )

    def help(
        self, part: Part, constants: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> Helping:
        return _standin_help(self.spec, part, Part.BRANCH, constants, self._seconds / 2)

    def _wait(self, share: float) -> None:
        if self._seconds:
            sleep(self._seconds * share)


class StandinControlNet(Standin):
    def help(
        self, part: Part, constants: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> Helping:
        return _standin_help(self.spec, part, Part.CONTROL, constants, self._seconds)


def _standin_help(
    spec: LoadSpec, part: Part, own: Part, constants: Mapping[str, PortValue], seconds: float
) -> Helping:
    key = constants.get("key")
    if part is not own or not isinstance(key, int):
        raise InvalidInput(f"a {spec.component} helps with no {part.value}", field="helper")
    return StandinPart(key, RESIDUALS if part is Part.CONTROL else 1, seconds)


def _mixed(state: int, items: Iterable[tuple[str, PortValue]]) -> int:
    for name, value in items:
        if isinstance(value, torch.Tensor | np.ndarray):
            value = value.sum().item()
        state = (state * 31 + _digest(f"{name}={value!r}".encode())) % _MODULUS
    return state


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
    return _CLASSES.get(spec.component, Standin)(spec)


_CLASSES = {"transformer": StandinDenoiser, "controlnet": StandinControlNet}
STANDIN = Family("standin", tuple(_STAGES), _load)
