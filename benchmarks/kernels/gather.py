# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Gathering tokens beside `torch.gather`: CPU time of a forward and a backward.

Part of `python -m benchmarks.kernels.cpu`; the peer is that of `make bench-gpu` too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.common import Row
from benchmarks.kernels.rows import compare, sample
from shiva_kernels.ops import gather_tokens


def peer(x: Tensor, index: Tensor) -> Tensor:
    """What one writes without this module."""
    return torch.gather(x, 1, index[..., None].expand(-1, -1, x.shape[2]))


def run(rounds: int) -> list[Row]:
    """Ours beside the peer, in turn; 4,096 tokens of width 768, 0.6 of them."""
    x, index, _ = sample()
    return compare("gather", gather_tokens, peer, (x, index), rounds)
