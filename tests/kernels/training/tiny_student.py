# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A tiny random SD3 transformer, and data without a pipeline."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from shiva_kernels.training.assemble import make_student
from shiva_kernels.training.config import TrainConfig
from shiva_kernels.training.data import Batch
from shiva_kernels.training.student import Student

SIDE, CHANNELS, WIDTH = 8, 4, 16  # latents of 8 x 8: 16 image tokens


class RandomSource:
    """Batches of noise: a function of the seed, as a source must be."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def batch(self, seed: int, size: int, dropout: float = 0.0) -> Batch:
        self.seeds.append(seed)
        generator = torch.Generator().manual_seed(seed)
        shapes = ((size, CHANNELS, SIDE, SIDE), (size, 3, WIDTH), (size, WIDTH))
        latents, context, pooled = (torch.randn(s, generator=generator) for s in shapes)
        return Batch(latents, context, pooled, ("",) * size)


def tiny_transformer(seed: int = 0) -> SD3Transformer2DModel:
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    ).eval()


def student_of(config: TrainConfig) -> Student:
    pipeline: Any = SimpleNamespace(
        transformer=tiny_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5)
    )
    return make_student(pipeline, config, pixels=8 * SIDE)
