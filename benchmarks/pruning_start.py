# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A node's second start beside its first: warming up with the compiler's cache kept and without.

Each start is a process of its own: an SD3 of two kinds of blocks is compiled before its first
request. What counts is the CPU time of the warm-up alone, imports and weights left out.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Row

WIDTH, BLOCKS, TEXT, SIDE = 768, 4, 77, 64
STARTS = 3


def start(root: str) -> None:
    """Prints CPU seconds, graphs and compiling seconds of one warm-up with the cache in `root`."""
    import time

    import torch
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    from shiva_kernels import Artifact, ShivaConfig, apply_shiva
    from shiva_kernels.compile import compile_blocks, use_cache

    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformer: Any = SD3Transformer2DModel(
        sample_size=SIDE,
        num_layers=BLOCKS,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=SIDE // 2,
    ).eval()
    artifact = Artifact.untrained(transformer, tokens=SIDE**2 // 4, sigmas=(1.0,))
    handle = apply_shiva(transformer, ShivaConfig(artifact, 0.6))
    use_cache(Path(root), "benchmark", torch.device("cpu"))
    compiled = compile_blocks(handle)
    # The compiler's own processes count too.
    before = _cpu(time)
    compiled.warm_up(1, (SIDE, SIDE), TEXT)
    print("RESULT", _cpu(time) - before, compiled.graphs, compiled.seconds)


def _cpu(time: Any) -> float:
    import os

    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def _measured(root: str) -> tuple[float, int]:
    code = f"from benchmarks.pruning_start import start; start({root!r})"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    _, seconds, graphs, _ = next(x for x in out.splitlines() if x.startswith("RESULT")).split()
    return float(seconds), int(graphs)


def run(rounds: int) -> list[Row]:
    """Medians of at most three starts of each sort, in turn: a start takes long."""
    import statistics

    first: list[float] = []
    second: list[float] = []
    graphs = 0
    rounds = min(rounds, STARTS)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as root:
            seconds, graphs = _measured(root)
            first.append(seconds)
            second.append(_measured(root)[0])
    name = f"warm-up of {graphs} graphs, second start beside the first"
    a, b = statistics.median(second), statistics.median(first)
    return [Row("pruning-start", name, a, b, "CPU s", "", None, rounds)]
