# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The soft rank beside autograd through its formula: bytes kept for backward, and CPU time.

Part of `python -m benchmarks.kernels.cpu`; the peer is that of `make bench-gpu` too.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import Row, alternate, at_most
from shiva_kernels.ops import soft_rank

SIZES = (256, 1024, 4096)
TAU = 0.2


def naive_soft_rank(scores: Tensor, tau: float) -> Tensor:
    """Algorithm 1 of arXiv 2602.05605, as it is written: autograd keeps N x N maps."""
    pairs = torch.sigmoid((scores[:, None, :] - scores[:, :, None]) / tau)
    others = 1 - torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device)
    return 1 + (pairs * others).sum(-1)


def saved_bytes(op: Callable[[Tensor, float], Tensor], scores: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps from `op` for its backward."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = op(scores, TAU)  # alive until the count is done: no address is used twice
    del out
    return sum(kept.values())


def cpu_milliseconds(op: Callable[[Tensor, float], Tensor], scores: Tensor) -> float:
    """CPU time of a forward and a backward."""
    start = time.process_time()
    op(scores, TAU).square().sum().backward()
    return 1000 * (time.process_time() - start)


def run(rounds: int) -> list[Row]:
    """Ours beside the naive form, in turn; [1, N] float32 on a CPU."""
    rows = []
    for tokens in SIZES:
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(1, tokens, generator=generator).requires_grad_()
        name = f"soft rank of {tokens}"
        kept, peer = (saved_bytes(op, scores) for op in (soft_rank, naive_soft_rank))
        limit = 0.05 if tokens == max(SIZES) else 1
        rows.append(at_most("kernels", f"{name}, bytes saved", [kept], [peer], "bytes", limit))
        ours, theirs = alternate(
            lambda s=scores: cpu_milliseconds(soft_rank, s),
            lambda s=scores: cpu_milliseconds(naive_soft_rank, s),
            rounds,
            warmup=2,
        )
        rows.append(at_most("kernels", f"{name}, CPU time", ours, theirs, "ms", 1))
    return rows
