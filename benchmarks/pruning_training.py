# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a training step of pruning costs: the surrogate, the teacher and the DoRA, each alone.

A step is a forward and a backward pass of one micro-batch at keep ratio 0.6, in CPU seconds of the
process, one thread, float32, random weights. The surrogate is compared with the same step of the
same k without it; the goal is the paper's 1.07 with room for noise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.common import Row, alternate, at_most

RATIO, TEXT, LIMIT = 0.6, 56, 1.10


@dataclass(frozen=True)
class Size:
    """An SD3 transformer, and how many samples a micro-batch has."""

    tokens: int
    width: int
    blocks: int
    batch: int


SIZES = (Size(256, 128, 8, 4), Size(1024, 768, 3, 1))


class _Step:
    """Training steps of one student; the backbone itself learns, or its DoRA."""

    def __init__(self, size: Size, *, adapter: bool) -> None:
        import torch
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

        from shiva_kernels import Artifact, ShivaConfig, apply_shiva
        from shiva_kernels.estimators import Estimator, Surrogate
        from shiva_kernels.training.config import Steps, TrainConfig
        from shiva_kernels.training.data import Batch
        from shiva_kernels.training.student import Pruning, Student

        torch.manual_seed(0)
        side, heads = 2 * round(size.tokens**0.5), size.width // 32
        transformer: Any = SD3Transformer2DModel(
            sample_size=side,
            num_layers=size.blocks,
            attention_head_dim=32,
            num_attention_heads=heads,
            joint_attention_dim=size.width,
            caption_projection_dim=size.width,
            pooled_projection_dim=size.width,
            pos_embed_max_size=side,
            qk_norm="rms_norm",
        )
        artifact = Artifact.untrained(transformer, tokens=size.tokens, sigmas=(1.0,))
        handle = apply_shiva(transformer, ShivaConfig(artifact, None))
        config = TrainConfig(steps=Steps(joint=int(adapter)), rank=32)
        self.student = Student(handle, artifact.policy, config)
        self.student.adapting = adapter
        if not adapter:
            transformer.requires_grad_(True)
        shapes = ((size.batch, 16, side, side), (size.batch, TEXT, size.width))
        latents, context = (torch.randn(shape) for shape in shapes)
        self.batch = Batch(latents, context, torch.randn(size.batch, size.width), ())
        self.sigma = torch.tensor(0.5)
        ratios = torch.full((self.student.prunable,), RATIO)
        self.plain = Pruning(ratios)
        # A small step up: k is floor(N r), and must not fall by one when r becomes a leaf.
        learnt = (ratios + 1e-6).requires_grad_()
        self.gated = Pruning(learnt, Surrogate(Estimator.RESIDUAL), 0.1, torch.Generator())

    def seconds(self, *, surrogate: bool, teacher: bool = False) -> Callable[[], float]:
        """CPU seconds of one step."""
        pruning = self.gated if surrogate else self.plain

        def call() -> float:
            start = time.process_time()
            student, batch = self.student, self.batch
            if teacher:
                student.teacher(batch.latents, self.sigma, batch, every=4)
            velocity = student.observe(batch.latents, self.sigma, batch, pruning, every=4).velocity
            velocity.square().mean().backward()
            return time.process_time() - start

        return call


def _rows(size: Size, rounds: int) -> list[Row]:
    name = f"{size.tokens} tokens x {size.width} x {size.blocks} blocks, training step"
    full, adapter = _Step(size, adapter=False), _Step(size, adapter=True)
    on, off = alternate(full.seconds(surrogate=True), full.seconds(surrogate=False), rounds)
    rows = [
        at_most("pruning-training", f"{name}: surrogate on / off", on, off, "CPU s", LIMIT),
    ]
    taught, alone = alternate(
        full.seconds(surrogate=True, teacher=True), full.seconds(surrogate=True), rounds
    )
    rows.append(_context(f"{name}: with the teacher's forward / without", taught, alone))
    dora, plain = alternate(adapter.seconds(surrogate=True), full.seconds(surrogate=True), rounds)
    rows.append(_context(f"{name}: DoRA of rank 32 / all weights", dora, plain))
    return rows


def _context(name: str, ours: list[float], peer: list[float]) -> Row:
    a, b = statistics.median(ours), statistics.median(peer)
    return Row("pruning-training", name, a, b, "CPU s", "", None, len(ours))


def run(rounds: int) -> list[Row]:
    """Medians of `rounds`."""
    import torch

    torch.set_num_threads(1)
    return [row for size in SIZES for row in _rows(size, rounds)]
