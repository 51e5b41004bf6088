# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""From a pipeline and a config to a student, and from a trained student to an artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from peft import get_peft_model_state_dict

from shiva_kernels.adapter import Adapter
from shiva_kernels.apply import apply_shiva
from shiva_kernels.artifact import Artifact, ShippedTable
from shiva_kernels.config import ShivaConfig
from shiva_kernels.errors import ShivaError
from shiva_kernels.policy import RatioPolicy
from shiva_kernels.tables import RatioCurve
from shiva_kernels.training.bins import BinnedRatios
from shiva_kernels.training.config import Ratios, TrainConfig
from shiva_kernels.training.evaluation import sigma_grid
from shiva_kernels.training.student import ADAPTER, Student

BUDGETS = (0.8, 0.6, 0.4)
GRID_STEPS = 28


def load_pipeline(folder: Path, transformer: Path | None = None) -> StableDiffusion3Pipeline:
    """A pipeline in float32, with the transformer of another folder where one is given."""
    parts: dict[str, Any] = {}
    if transformer is not None:
        parts["transformer"] = SD3Transformer2DModel.from_pretrained(transformer)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_tokens(transformer: Any, pixels: int, vae_factor: int = 8) -> int:
    """Of a square picture."""
    return (pixels // vae_factor // transformer.config.patch_size) ** 2


def make_student(
    pipeline: StableDiffusion3Pipeline,
    config: TrainConfig,
    *,
    pixels: int,
    budgets: Iterable[float] = BUDGETS,
) -> Student:
    """An untrained student on the pipeline's transformer, its hooks attached.

    Two students of one seed start with the same router, whatever was drawn before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        artifact = Artifact.untrained(
            pipeline.transformer,
            tokens=image_tokens(pipeline.transformer, pixels),
            sigmas=sigma_grid(pipeline.scheduler, GRID_STEPS),
            budgets=budgets,
            target=config.target,
            width=config.router_width,
            sharing=config.router_sharing,
        )
    handle = apply_shiva(pipeline.transformer, ShivaConfig(artifact, budget=None))
    policy: RatioPolicy | BinnedRatios = artifact.policy
    if config.arm.ratios is Ratios.BINS:
        policy = BinnedRatios(handle.block_count, config.target)
    return Student(handle, policy, config)


def curve_of(student: Student) -> RatioCurve:
    """What the arm has learnt about ratios: the policy's curve, or the same everywhere.

    Raises:
        ShivaError: ratios in bins are no curve, and make no artifact.
    """
    if isinstance(student.policy, BinnedRatios):
        raise ShivaError("ratios in bins are there to compare with: train ratios: policy instead")
    if student.config.arm.ratios is Ratios.POLICY:
        return student.policy.curve()
    return RatioCurve.uniform(student.handle.block_count)


def finished_artifact(
    student: Student,
    quality: Mapping[float, Mapping[str, Any]] | None = None,
    *,
    step: int | None = None,
) -> Artifact:
    """The artifact of a trained student, with its budgets' tables; `step` of its config's steps.

    Raises:
        ShivaError: the arm has no router, and so nothing to ship.
    """
    if not student.config.arm.learns_scores:
        raise ShivaError("only an arm with a router makes an artifact")
    start, curve = student.handle.artifact, curve_of(student)
    tables = {
        budget: ShippedTable(
            budget, curve, table.sigmas, table.tokens, dict((quality or {}).get(budget, {}))
        )
        for budget, table in start.tables.items()
    }
    training = student.config.model_dump(mode="json") | {"key": student.config.key()}
    if step is not None:
        training["step"] = step
    return replace(start, tables=tables, adapter=_adapter(student), training=training)


def _adapter(student: Student) -> Adapter | None:
    if not student.adapting:
        return None
    config = student.transformer.peft_config[ADAPTER]
    arguments = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_dora": config.use_dora,
        "target_modules": sorted(config.target_modules),
    }
    weights = get_peft_model_state_dict(student.transformer, adapter_name=ADAPTER)
    return Adapter(arguments, weights)
