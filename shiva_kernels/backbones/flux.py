# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Flux.1: double blocks, then single blocks, with rotary positions in every attention.

The rotary table has a row for each text token and then for each image token, one for the whole
batch; the kept tokens take their rows along. Where the images of a batch keep different tokens, the
block therefore runs image by image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shiva_kernels.backbones.base import Arguments, Backbone, Widths
from shiva_kernels.errors import Unsupported


class Flux(Backbone):
    name = "flux"
    rows_are_images = True

    def widths(self, transformer: Any) -> Widths:
        dim = transformer.inner_dim
        return Widths(dim, dim, transformer.config.pooled_projection_dim)

    def time_embedder(self, transformer: Any) -> nn.Module:
        return transformer.time_text_embed.timestep_embedder

    def pooled(self, arguments: Arguments) -> torch.Tensor:
        return arguments["pooled_projections"]

    def sigmas(self, arguments: Arguments) -> torch.Tensor:
        return arguments["timestep"]

    def example(self, transformer: Any, rows: int, size: tuple[int, int], text: int) -> Arguments:
        config = transformer.config
        tokens = size[0] * size[1] // 4  # 2 x 2 latents are packed into a token
        example = {
            "hidden_states": torch.zeros(rows, tokens, config.in_channels),
            "encoder_hidden_states": torch.zeros(rows, text, config.joint_attention_dim),
            "pooled_projections": torch.zeros(rows, config.pooled_projection_dim),
            "timestep": torch.zeros(rows),
            "img_ids": torch.zeros(tokens, 3),
            "txt_ids": torch.zeros(text, 3),
            "return_dict": False,
        }
        return example | ({"guidance": torch.ones(rows)} if config.guidance_embeds else {})

    def check(self, arguments: Arguments) -> None:
        super().check(arguments)
        if (arguments.get("joint_attention_kwargs") or {}).get("attention_mask") is not None:
            raise Unsupported("an attention mask over all tokens does not fit pruned blocks")

    def token_axes(self, arguments: Arguments, name: str) -> list[tuple[torch.Tensor, int]]:
        rotary = arguments.get("image_rotary_emb") or ()
        return [*super().token_axes(arguments, name), *((table, 0) for table in rotary)]

    def run(
        self, forward: Callable[..., Any], arguments: Arguments, name: str, index: torch.Tensor
    ) -> Any:
        text = arguments["encoder_hidden_states"].shape[1]
        if index.shape[0] == 1:
            return forward(**self._with_rotary(arguments, text, index[0]))
        outputs = []
        for row in range(arguments[name].shape[0]):
            own = {key: _row(value, row) for key, value in arguments.items()}
            outputs.append(forward(**self._with_rotary(own, text, index[row % index.shape[0]])))
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))

    def _with_rotary(self, arguments: Arguments, text: int, index: torch.Tensor) -> Arguments:
        rotary = arguments.get("image_rotary_emb")
        if rotary is None:
            return arguments
        rows = tuple(torch.cat([table[:text], table[text:][index]]) for table in rotary)
        return {**arguments, "image_rotary_emb": rows}


def _row(value: Any, row: int) -> Any:
    """The part of one batch row; what is not a tensor is shared by all."""
    return value[row : row + 1] if isinstance(value, torch.Tensor) else value
