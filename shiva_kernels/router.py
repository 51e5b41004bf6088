# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The context-aware router: one score a token (Shiva-DiT, section on the ShivaRouter, Eq. 8-9).

    h_ctx = Proj_t(t) + Proj_p(c) + Proj_l(l)                               (8)
    s_i   = w^T LayerNorm(SiLU(Proj_x(x_i) + h_ctx))                        (9)

t is the backbone's own time embedding and c its own pooled text; l is a learnt vector of the block.
Neighbouring blocks share the weights of one router and differ only in l ("Group-12": 24 blocks, 12
routers). The router computes in float32 whatever the backbone's dtype: bfloat16 scores tie, and
ties are broken by position.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

LAYER_DIM = 64


class GroupRouter(nn.Module):
    """The weights that one group of blocks shares."""

    def __init__(self, dim: int, time_dim: int, pooled_dim: int, width: int) -> None:
        super().__init__()
        self.proj_x = nn.Linear(dim, width)
        self.proj_t = nn.Linear(time_dim, width, bias=False)
        self.proj_p = nn.Linear(pooled_dim, width, bias=False)
        self.proj_l = nn.Linear(LAYER_DIM, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.w = nn.Linear(width, 1, bias=False)

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, pooled: torch.Tensor, layer: torch.Tensor
    ) -> torch.Tensor:
        """Scores (B, N) of x (B, N, D), time (B, T), pooled (B, P), layer (LAYER_DIM,)."""
        context = self.proj_t(time) + self.proj_p(pooled) + self.proj_l(layer)
        hidden = torch.nn.functional.silu(self.proj_x(x) + context[:, None])
        return self.w(self.norm(hidden))[..., 0]


class ShivaRouter(nn.Module):
    """Scores of every block. `sharing` neighbouring blocks have one `GroupRouter`.

    Block 0 is dense and never scored; it is counted in its group, as the paper counts.
    """

    def __init__(
        self,
        dim: int,
        time_dim: int,
        pooled_dim: int,
        blocks: int,
        width: int = 64,
        sharing: int = 2,
    ) -> None:
        super().__init__()
        self.sharing = sharing
        count = -(-blocks // sharing)
        self.groups = nn.ModuleList(
            GroupRouter(dim, time_dim, pooled_dim, width) for _ in range(count)
        )
        self.layer_embedding = nn.Embedding(blocks, LAYER_DIM)

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, pooled: torch.Tensor, block: int
    ) -> torch.Tensor:
        """Raw scores (B, N), float32, of the tokens x (B, N, D) that enter `block`."""
        group = self.groups[block // self.sharing]
        layer = self.layer_embedding.weight[block]
        with _full_precision(x.device.type):
            return group(x.float(), time.float(), pooled.float(), layer)


def _full_precision(device: str) -> AbstractContextManager[object]:
    """No autocast, where the device has it: the meta device has not."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def parameter_count(
    dim: int, time_dim: int, pooled_dim: int, blocks: int, width: int, sharing: int
) -> int:
    """Parameters of a router: the paper's Table 2, by arithmetic of the module itself."""
    with torch.device("meta"):
        router = ShivaRouter(dim, time_dim, pooled_dim, blocks, width, sharing)
    return sum(p.numel() for p in router.parameters())
