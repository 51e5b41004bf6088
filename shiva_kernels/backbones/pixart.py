# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""PixArt-Sigma: self-attention over the image, cross-attention to the text, discrete timesteps.

It has no pooled text: the mean of the caption's features over its tokens takes that place. (The
paper does not say what it used.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shiva_kernels.backbones.base import Arguments, Backbone, Widths
from shiva_kernels.errors import Unsupported


class PixArt(Backbone):
    name = "pixart"

    def widths(self, transformer: Any) -> Widths:
        config = transformer.config
        pooled = config.caption_channels or config.cross_attention_dim
        return Widths(transformer.inner_dim, transformer.inner_dim, pooled)

    def time_embedder(self, transformer: Any) -> nn.Module:
        return transformer.adaln_single.emb.timestep_embedder

    def pooled(self, arguments: Arguments) -> torch.Tensor:
        text = arguments["encoder_hidden_states"].float()
        mask = arguments.get("encoder_attention_mask")
        if mask is None:
            return text.mean(dim=1)
        # A bias (B, 1, T) of 0 and -10000 says the same as a mask (B, T) of 1 and 0.
        mask = (mask[:, 0] > -1 if mask.ndim == 3 else mask > 0)[..., None].float()
        return (text * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def sigmas(self, arguments: Arguments) -> torch.Tensor:
        return torch.as_tensor(arguments["timestep"]).float() / 1000

    def example(self, transformer: Any, rows: int, size: tuple[int, int], text: int) -> Arguments:
        config = transformer.config
        extra: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if transformer.use_additional_conditions:
            extra = {"resolution": torch.ones(rows, 2), "aspect_ratio": torch.ones(rows, 1)}
        width = config.caption_channels or config.cross_attention_dim
        return {
            "hidden_states": torch.zeros(rows, config.in_channels, *size),
            "encoder_hidden_states": torch.zeros(rows, text, width),
            "timestep": torch.zeros(rows),
            "added_cond_kwargs": extra,
            "return_dict": False,
        }

    def check(self, arguments: Arguments) -> None:
        super().check(arguments)
        if arguments.get("attention_mask") is not None:
            raise Unsupported("a mask over the image's tokens does not fit pruned blocks")
