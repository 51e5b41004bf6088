# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5: joint blocks, some with a second attention over the image alone.

Positions are added before the first block, so a gathered token carries its own. ControlNet
residuals are added between blocks, outside the hook, on all tokens. The last block drops its text
output; that is the block's own affair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shiva_kernels.backbones.base import Arguments, Backbone, Widths


class Sd3(Backbone):
    name = "sd3"

    def widths(self, transformer: Any) -> Widths:
        dim = transformer.inner_dim
        return Widths(dim, dim, transformer.config.pooled_projection_dim)

    def time_embedder(self, transformer: Any) -> nn.Module:
        return transformer.time_text_embed.timestep_embedder

    def pooled(self, arguments: Arguments) -> torch.Tensor:
        return arguments["pooled_projections"]

    def sigmas(self, arguments: Arguments) -> torch.Tensor:
        return arguments["timestep"] / 1000

    def example(self, transformer: Any, rows: int, size: tuple[int, int], text: int) -> Arguments:
        config = transformer.config
        return {
            "hidden_states": torch.zeros(rows, config.in_channels, *size),
            "encoder_hidden_states": torch.zeros(rows, text, config.joint_attention_dim),
            "pooled_projections": torch.zeros(rows, config.pooled_projection_dim),
            "timestep": torch.zeros(rows),
            "return_dict": False,
        }

    def is_follower(self, arguments: Arguments) -> bool:
        return arguments.get("skip_layers") is not None
