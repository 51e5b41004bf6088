# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Pruned blocks beside the same compiled blocks on k tokens that lie together.

What the peer lacks is all that pruning adds: router, top-k, gather, scatter and the hooks. One
process, one thread, float32, CPU seconds of the process; random weights, batch 1, 77 text tokens.
Three rows for each size and budget: that comparison, the speed-up over the dense blocks as a share
of what their FLOPs allow, and (once) graphs for any k beside a graph for one k.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.common import Row, alternate, at_most

TEXT, HEAD = 77, 64
# Image tokens, width, pruned blocks.
SIZES = ((1024, 768, 3), (4096, 768, 2))
BUDGETS = (0.8, 0.6)
LIMIT = 1.05


class _Stack:
    """The middle blocks of an SD3 transformer, which are all of one kind, compiled."""

    def __init__(self, tokens: int, width: int, blocks: int) -> None:
        import torch
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

        from shiva_kernels import Artifact, ShivaConfig, apply_shiva
        from shiva_kernels.compile import compile_blocks
        from shiva_kernels.flops import cost_model

        side = int(tokens**0.5)
        torch.manual_seed(0)
        self.tokens = tokens
        self.transformer: Any = SD3Transformer2DModel(
            sample_size=2 * side,
            num_layers=blocks + 2,
            attention_head_dim=HEAD,
            num_attention_heads=width // HEAD,
            joint_attention_dim=width,
            caption_projection_dim=width,
            pooled_projection_dim=width,
            pos_embed_max_size=side,
            qk_norm="rms_norm",
        ).eval()
        artifact = Artifact.untrained(self.transformer, tokens=tokens, sigmas=(1.0,))
        self.handle = apply_shiva(self.transformer, ShivaConfig(artifact, None))
        self.compiled = compile_blocks(self.handle)
        self.cost = cost_model(self.transformer, 1, (2 * side, 2 * side), TEXT)
        self.middle = range(1, blocks + 1)
        # As a node's tensors are: a graph of inference mode takes no others.
        with torch.inference_mode():
            self.x = torch.randn(1, tokens, width)
            self.text = torch.randn(1, TEXT, width)
            self.time, self.pooled = torch.randn(1, width), torch.randn(1, width)

    def pruned(self, budget: float) -> Callable[[], float]:
        """CPU seconds of the blocks as a request of `budget` runs them."""
        from shiva_kernels.hooks import running

        arguments = {"pooled_projections": self.pooled, "timestep": self.time[:, 0]}
        request = self.handle.request(budget)
        blocks = [self.transformer.transformer_blocks[i] for i in self.middle]

        def call() -> None:
            with request.step(1.0):
                mode: Any = self.handle.mode_of_call(arguments, "")
            mode.time = self.time
            with running(self.handle, mode):
                self._through(blocks, self.x)

        return lambda: _cpu(call)

    def together(self, k: int) -> Callable[[], float]:
        """CPU seconds of the same compiled blocks on the first k tokens, and nothing else."""
        x = self.x[:, :k].clone()
        forwards: list[Any] = [self.handle.block_hooks[i].compiled for i in self.middle]
        return lambda: _cpu(lambda: self._through(forwards, x))

    def _through(self, blocks: list[Any], x: Any) -> None:
        text = self.text
        for block in blocks:
            text, x = block(hidden_states=x, encoder_hidden_states=text, temb=self.time)

    def k(self, budget: float) -> int:
        return self.handle.table(budget, (1.0,), self.tokens).k[0][1]

    def flops_ratio(self, k: int) -> float:
        """Dense over pruned with its router, true counting, of these blocks."""
        costs = [self.cost.blocks[i] for i in self.middle]
        return sum(c.dense.true for c in costs) / sum(c.of(k).true for c in costs)


def _cpu(call: Callable[[], None]) -> float:
    import torch

    with torch.inference_mode():
        start = time.process_time()
        call()
        return time.process_time() - start


def _rows(stack: _Stack, width: int, rounds: int) -> list[Row]:
    rows: list[Row] = []
    dense = stack.together(stack.tokens)
    for budget in BUDGETS:
        k = stack.k(budget)
        name = f"{stack.tokens} tokens x {width}, budget {budget:g} (k={k})"
        ours, peer = alternate(stack.pruned(budget), stack.together(k), rounds, warmup=2)
        rows.append(at_most("pruning", name, ours, peer, "CPU s", LIMIT, "peer: k tokens together"))
        whole, pruned = alternate(dense, stack.pruned(budget), rounds)
        speed_up = statistics.median(whole) / statistics.median(pruned)
        limit = stack.flops_ratio(k)
        note = f"{100 * speed_up / limit:.0f} % of the FLOPs limit"
        rows.append(
            Row(
                "pruning",
                f"{name}, faster than dense",
                speed_up,
                limit,
                "x",
                "",
                None,
                rounds,
                note,
            )
        )
    return rows


def _shapes(stack: _Stack, width: int, rounds: int) -> Row:
    """One graph for any k beside a graph for this k alone."""
    from shiva_kernels.compile import Shapes, compile_blocks

    k = stack.k(0.6)
    dynamic = stack.together(k)
    graphs, seconds = stack.compiled.graphs, stack.compiled.seconds
    static_blocks = compile_blocks(stack.handle, Shapes.PER_K)
    static = stack.together(k)
    ours, peer = alternate(dynamic, static, rounds, warmup=2)
    note = (
        f"{graphs} graph(s) for every k, compiled in {seconds:.0f} s; "
        f"{static_blocks.graphs} for this k alone in {static_blocks.seconds:.0f} s"
    )
    name = f"{stack.tokens} tokens x {width}, dynamic shapes beside a graph for k={k}"
    a, b = statistics.median(ours), statistics.median(peer)
    return Row("pruning", name, a, b, "CPU s", "", None, rounds, note)


def run(rounds: int) -> list[Row]:
    """Medians of `rounds`, of more at the smaller size."""
    import torch

    torch.set_num_threads(1)
    rows: list[Row] = []
    for i, (tokens, width, blocks) in enumerate(SIZES):
        stack = _Stack(tokens, width, blocks)
        # Short calls are noisier; all sizes take about as long.
        times = max(rounds * SIZES[-1][0] // tokens, rounds)
        rows += _rows(stack, width, times)
        if i == 0:
            rows.append(_shapes(stack, width, times))
    return rows
