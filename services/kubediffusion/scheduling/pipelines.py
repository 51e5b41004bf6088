# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A workflow as a scheduler sees it: which models, how often, in which order; and one request."""

from __future__ import annotations

from dataclasses import dataclass

from kubediffusion.scheduling.costs import DEFAULT, Costs

DECODE = "decode_latents"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of what goes from model to model, for one image."""

    embeddings: float = 4 << 20
    latents: float = 512 << 10
    residual: float = 25 << 20
    residuals: int = 0


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Text encoders, a loop of `steps` over the denoiser and its ControlNets, a decoder.

    ``prompts`` and ``branches`` are 2 with classifier-free guidance. ``together``: the reference
    pipeline runs both branches as one batch (SD3), or as two calls (Flux).
    """

    name: str
    family: str
    encoders: tuple[str, ...]
    denoiser: str
    decoder: str
    steps: int
    controls: tuple[str, ...] = ()
    prompts: int = 2
    branches: int = 2
    together: bool = True
    sampler: str = ""
    latents: str = ""
    decode_mode: str = DECODE
    sizes: Sizes = Sizes()

    @property
    def models(self) -> tuple[str, ...]:
        return (*self.encoders, self.denoiser, *self.controls, self.decoder)

    def encode_seconds(self, costs: Costs, batch: int = 1) -> float:
        """All encoders, all prompts of a request, at `batch` prompts a call."""
        return self.prompts * sum(costs.run(each, batch) / batch for each in self.encoders)

    def step_seconds(self, costs: Costs, batch: int) -> float:
        """One step of one request when its forwards go `batch` at a time: denoiser, ControlNets."""
        each = sum(costs.run(model, batch) for model in (self.denoiser, *self.controls))
        return self.branches * each / batch

    def decode_seconds(self, costs: Costs) -> float:
        return costs.run(self.decoder, 1, self.decode_mode)

    def solo_seconds(self, costs: Costs) -> float:
        """One request alone on one accelerator, as the reference pipeline computes it."""
        batch = self.branches if self.together else 1
        step = self.step_seconds(costs, batch)
        return self.encode_seconds(costs) + self.steps * step + self.decode_seconds(costs)

    def least_seconds(self, costs: Costs) -> float:
        """Accelerator seconds at the best batches that a deadline of twice the solo time leaves:
        encoders 8, denoiser and ControlNets 4, decoder 1."""
        return (
            self.encode_seconds(costs, 8)
            + self.steps * self.step_seconds(costs, 4)
            + self.decode_seconds(costs)
        )


@dataclass(slots=True, eq=False)
class Job:
    """One request. Times are seconds of the scheduler's clock.

    One that was begun elsewhere, or lost what it had, comes with what is done: ``encoded``, and
    `steps` that are left (None: all).
    """

    id: int
    pipeline: Pipeline
    arrival: float
    deadline: float
    solo: float
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    encoded: bool = False
    steps: int | None = None

    @property
    def steps_left(self) -> int:
        return self.pipeline.steps if self.steps is None else self.steps


def default_mode(pipeline: Pipeline, model: str) -> str:
    return pipeline.decode_mode if model == pipeline.decoder else DEFAULT
