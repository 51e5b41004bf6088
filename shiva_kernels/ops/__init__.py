# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The operations of static-budget pruning: Triton on a GPU, plain PyTorch on a CPU.

One operation is one module here, one test under `tests/kernels/` and one benchmark under
`benchmarks/kernels/`. All are differentiable and pass `torch.compile(fullgraph=True)`.
"""

from shiva_kernels.ops.gather import gather_tokens
from shiva_kernels.ops.scatter import scatter_tokens
from shiva_kernels.ops.soft_rank import soft_rank

__all__ = ["gather_tokens", "scatter_tokens", "soft_rank"]
