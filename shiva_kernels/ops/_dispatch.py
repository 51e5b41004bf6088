# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Triton where there is one; a stand-in where there is none, so that the modules still import.

Each operation is a `torch.library.custom_op`: opaque to the compiler, hence the same under
`torch.compile(fullgraph=True)` on a CPU and on a GPU. (A `triton_op` would be traced into, which
fails on a machine without a GPU.)
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:

    def _without_triton(fn: Callable[..., Any]) -> Callable[..., Any]:
        """Decorates a kernel that is never launched: without Triton there is no GPU path."""
        return fn

    triton: Any = SimpleNamespace(jit=_without_triton)
    tl: Any = SimpleNamespace()
    HAS_TRITON = False
else:
    HAS_TRITON = True

__all__ = ["HAS_TRITON", "tl", "triton"]
