# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of gather and scatter share: a sample, and CPU time of both passes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import Row, alternate, at_most


def sample(
    tokens: int = 4096, width: int = 768, keep: float = 0.6
) -> tuple[Tensor, Tensor, Tensor]:
    """x [1, N, D], index [1, k] ascending and y [1, k, D]; float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    k = int(keep * tokens)
    index = torch.randperm(tokens, generator=generator)[:k].sort().values[None]
    x = torch.randn(1, tokens, width, generator=generator).requires_grad_()
    return x, index, torch.randn(1, k, width, generator=generator).requires_grad_()


def compare(
    name: str,
    ours: Callable[..., Tensor],
    peer: Callable[..., Tensor],
    arguments: tuple[Tensor, ...],
    rounds: int,
) -> list[Row]:
    """A row for the forward and one for the backward: milliseconds of CPU time, medians."""
    wanted = [t for t in arguments if t.requires_grad]
    grad = torch.ones_like(peer(*arguments))

    def forward(op: Callable[..., Tensor]) -> float:
        with torch.no_grad():
            start = time.process_time()
            op(*arguments)
            return 1000 * (time.process_time() - start)

    def backward(op: Callable[..., Tensor]) -> float:
        out = op(*arguments)
        start = time.process_time()
        torch.autograd.grad(out, wanted, grad)
        return 1000 * (time.process_time() - start)

    rows = []
    for way in (forward, backward):
        a, b = alternate(lambda w=way: w(ours), lambda w=way: w(peer), rounds, warmup=2)
        rows.append(at_most("kernels", f"{name} of 4096 x 768, {way.__name__}", a, b, "ms", 1))
    return rows
