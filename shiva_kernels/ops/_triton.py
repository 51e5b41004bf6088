# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Triton where there is one; a stand-in where there is none, so that the modules still import.

Each operation is a `torch.library.custom_op`: opaque to the compiler, hence the same under
`torch.compile(fullgraph=True)` on a CPU and on a GPU. (A `triton_op` would be traced into, which
fails on a machine without a GPU.)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:

    def _never_launched(fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn

    triton: Any = SimpleNamespace(jit=_never_launched)
    tl: Any = SimpleNamespace()
    HAS_TRITON = False
else:
    HAS_TRITON = True

__all__ = ["HAS_TRITON", "Launch", "tl", "triton"]


@dataclass(frozen=True)
class Launch:
    """How a module's kernels are launched, and compiled ahead of time for the table in the docs."""

    blocks: dict[str, int]
    num_warps: int

    def __call__(self, kernel: Any, grid: tuple[int, ...], first: Tensor, *rest: Any) -> None:
        """Launch on the device of `first`: Triton would take the current one."""
        device = torch.cuda.device(first.device) if first.is_cuda else nullcontext()
        with device:
            kernel[grid](first, *rest, **self.blocks, num_warps=self.num_warps)
