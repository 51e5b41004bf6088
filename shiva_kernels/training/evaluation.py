# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What an arm is worth: its velocity against the dense one, and the pictures it draws.

Samples are functions of a seed, so that every arm meets the same prompts, times and noise, and
differences can be paired.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from numpy.typing import NDArray
from torch import Tensor

from shiva_kernels.config import Guidance
from shiva_kernels.tables import KTable
from shiva_kernels.training.data import Batch, Captions, Source, trainer_module
from shiva_kernels.training.sampling import micro_seed, step_strata
from shiva_kernels.training.student import Observation, Pruning, Student

Floats = NDArray[np.float64]
# Keep ratios [prunable blocks] at a noise level.
Schedule = Callable[[float], Tensor]

_TEST_STEP = 1 << 30  # far from any training step, so that no seed is met again


def fixed_schedule(ratio: float, prunable: int) -> Schedule:
    """The same ratio everywhere."""
    ratios = torch.full((prunable,), ratio)
    return lambda sigma: ratios


def table_schedule(table: KTable) -> Schedule:
    """A table's rows, the nearest in sigma."""

    def schedule(sigma: float) -> Tensor:
        return torch.tensor(table.row(sigma)[1:], dtype=torch.float32) / table.tokens

    return schedule


@dataclass(frozen=True)
class Sample:
    """Samples at one noise level: mixed latents, and the velocity of the data they came from."""

    sigma: float
    mixed: Tensor
    target: Tensor
    batch: Batch
    seed: int


def fixed_samples(
    source: Source, count: int, shift: float, *, size: int = 8, seed: int = 0
) -> Iterator[Sample]:
    """`count` fixed (prompt, noise, time), `size` at a time: times by strata, as in training."""
    groups = count // size
    sigmas = step_strata(seed, _TEST_STEP, groups, shift, (1.0, 1.0)).sigmas
    for group, sigma in enumerate(sigmas):
        drawn = micro_seed(seed, _TEST_STEP, group, 0)
        batch = source.batch(drawn, size)
        generator = torch.Generator().manual_seed(drawn)
        noise = torch.randn(batch.latents.shape, generator=generator)
        mixed = (1 - float(sigma)) * batch.latents + float(sigma) * noise
        yield Sample(float(sigma), mixed, noise - batch.latents, batch, drawn)


@dataclass(frozen=True)
class VelocityErrors:
    """Mean squared errors of each sample [n]: to the dense model's velocity, to the data's."""

    to_dense: Floats
    to_data: Floats
    sigmas: Floats


@torch.no_grad()
def dense_answers(student: Student, samples: Sequence[Sample]) -> list[Observation]:
    """The backbone's before any training, on each sample: the same for every arm."""
    return [
        student.teacher(
            sample.mixed.to(student.device),
            torch.tensor(sample.sigma, device=student.device),
            sample.batch.to(student.device),
            deltas=student.needs_deltas,
        )
        for sample in samples
    ]


@torch.no_grad()
def velocity_errors(
    student: Student,
    samples: Sequence[Sample],
    schedule: Schedule | None,
    answers: Sequence[Observation] | None = None,
) -> VelocityErrors:
    """Of the student as it is now; without a schedule nothing is pruned.

    "Dense" is the backbone before any training: the adapter is off for it. `answers` are its
    `dense_answers` where they are known already.
    """
    to_dense, to_data, sigmas = [], [], []
    for sample, dense in zip(samples, answers or dense_answers(student, samples), strict=True):
        batch = sample.batch.to(student.device)
        sigma = torch.tensor(sample.sigma, device=student.device)
        mixed = sample.mixed.to(student.device)
        pruning = None
        if schedule is not None:
            generator = torch.Generator().manual_seed(sample.seed)
            pruning = Pruning(schedule(sample.sigma), generator=generator, deltas=dense.deltas)
        velocity = student.observe(mixed, sigma, batch, pruning).velocity
        to_dense.append(_per_sample(velocity, dense.velocity))
        to_data.append(_per_sample(velocity, sample.target.to(student.device)))
        sigmas.append(np.full(len(mixed), sample.sigma))
    return VelocityErrors(*(np.concatenate(part) for part in (to_dense, to_data, sigmas)))


def _per_sample(ours: Tensor, theirs: Tensor) -> Floats:
    return (ours.float() - theirs.float()).square().mean((1, 2, 3)).double().cpu().numpy()


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: the pipeline's own Euler steps, both branches in one forward."""

    steps: int = 28
    guidance: float = 4.0
    pixels: int = 256
    batch: int = 8


def sigma_grid(scheduler: FlowMatchEulerDiscreteScheduler, steps: int) -> tuple[float, ...]:
    """The noise levels at which the transformer is called, highest first."""
    scheduler.set_timesteps(steps)
    sigmas: Any = scheduler.sigmas
    return tuple(float(sigma) for sigma in sigmas[:-1])


@torch.no_grad()
def draw(
    student: Student,
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    schedule: Schedule | None,
) -> NDArray[np.uint8]:
    """Pictures [n, h, w, 3] of prompts with a seed each: a picture does not depend on its batch."""
    captions, pictures = Captions(pipeline), []
    for start in range(0, len(prompts), sampling.batch):
        part = slice(start, start + sampling.batch)
        latents = _noise(student, seeds[part], sampling)
        latents = _denoise(
            student, pipeline, captions, list(prompts[part]), latents, sampling, schedule
        )
        pictures.append(decode(pipeline, latents))
    return np.concatenate(pictures)


def _noise(student: Student, seeds: Sequence[int], sampling: Sampling) -> Tensor:
    side = sampling.pixels // 8
    shape = (student.channels, side, side)
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(student.device)


def _denoise(
    student: Student,
    pipeline: StableDiffusion3Pipeline,
    captions: Captions,
    prompts: list[str],
    latents: Tensor,
    sampling: Sampling,
    schedule: Schedule | None,
) -> Tensor:
    context, pooled = captions.encode([""] * len(prompts) + prompts)
    batch = Batch(latents, context.float(), pooled.float(), tuple(prompts)).to(student.device)
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    grid = (*sigma_grid(scheduler, sampling.steps), 0.0)
    for sigma, following in itertools.pairwise(grid):
        level = torch.tensor(sigma, device=student.device)
        both, pruning = torch.cat([latents, latents]), None
        if schedule is not None:
            deltas = None
            if student.needs_deltas:
                deltas = student.teacher(both, level, batch, deltas=True).deltas
            generator = torch.Generator().manual_seed(round(1e6 * sigma))
            pruning = Pruning(
                schedule(sigma), generator=generator, deltas=deltas, guidance=Guidance.PAIR
            )
        without, given = student.observe(both, level, batch, pruning).velocity.chunk(2)
        latents = latents + (following - sigma) * (without + sampling.guidance * (given - without))
    return latents


@torch.no_grad()
def decode(pipeline: StableDiffusion3Pipeline, latents: Tensor) -> NDArray[np.uint8]:
    """Pictures [n, h, w, 3] of latents [n, C, h / 8, w / 8]."""
    vae = pipeline.vae
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    image = vae.decode(scaled).sample.float().clamp(-1, 1)
    return (image.add(1).mul(127.5).round().byte()).permute(0, 2, 3, 1).cpu().numpy()


@dataclass(frozen=True)
class Case:
    """A prompt of the shapes world, the scene it means, and the seed of its noise."""

    prompt: str
    scene: Any
    seed: int
    cluster: int


def shape_cases(trainer: Path, prompts: int, seeds: int, *, stream: int = 20_000) -> list[Case]:
    """Two-object prompts of held-out combinations, each with `seeds` seeds; a prompt is a cluster.

    `stream` names the prompts: those of validation and those of the test differ in it. The world
    has no third object.
    """
    world = trainer_module(trainer, "world")
    scenes = itertools.islice(world.scenes(stream, held_out=True, pair_share=1.0), prompts)
    rng = random.Random(stream)
    told = [(world.caption(scene, rng), scene) for scene in scenes]
    return [
        Case(text, scene, 1000 * cluster + seed, cluster)
        for cluster, (text, scene) in enumerate(told)
        for seed in range(seeds)
    ]


def right(trainer: Path, cases: Sequence[Case], pictures: NDArray[np.uint8]) -> Floats:
    """1 for each picture in which everything is right by the world's checker, else 0."""
    check = trainer_module(trainer, "checker").check
    pairs = zip(cases, pictures, strict=True)
    return np.array([float(check(picture, case.scene).right) for case, picture in pairs])


@torch.no_grad()
def picture_features(pipeline: StableDiffusion3Pipeline, pictures: NDArray[np.uint8]) -> Floats:
    """Features [n, d] for KID: the pipeline's own autoencoder's latents, averaged to 4 x 4 cells.

    Not Inception, which would be a download and knows nothing of flat shapes: the numbers compare
    arms here, and nothing elsewhere.
    """
    vae, features = pipeline.vae, []
    for start in range(0, len(pictures), 8):
        images = torch.from_numpy(pictures[start : start + 8]).permute(0, 3, 1, 2)
        images = images.to(vae.device, vae.dtype).div(127.5).sub(1)
        latents = vae.encode(images).latent_dist.mean
        features.append(torch.nn.functional.adaptive_avg_pool2d(latents, 4).flatten(1))
    return torch.cat(features).double().cpu().numpy()
