# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Very small transformers of each architecture that can be pruned, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from shiva_kernels import Artifact, Guidance, ShivaConfig, ShivaHandle, apply_shiva
from shiva_kernels.artifact import ShippedTable
from shiva_kernels.tables import RatioCurve

SIDE, TOKENS, TEXT = 16, 64, 5
SIGMAS = tuple(i / 8 for i in range(8, 0, -1))


def make_sd3(**options: Any) -> Any:
    return SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=SIDE // 2,
        **options,
    )


def make_flux() -> Any:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def make_pixart() -> Any:
    return PixArtTransformer2DModel(
        sample_size=SIDE,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        cross_attention_dim=32,
        caption_channels=24,
    )


MAKERS = {
    "sd3": make_sd3,
    "sd35": lambda: make_sd3(dual_attention_layers=(0, 1, 2), qk_norm="rms_norm"),
    "flux": make_flux,
    "pixart": make_pixart,
}


def make(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = MAKERS[name]().eval().requires_grad_(False)
    # AdaLN gates start at zero and hide what a block does; a trained model's do not.
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    return transformer


def inputs(name: str, rows: int, sigma: float = 0.5, seed: int = 1) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    if name == "flux":
        side = SIDE // 2
        grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
        ids = torch.cat([torch.zeros(1, TOKENS), grid.flatten(1)]).T
        return {
            "hidden_states": draw(rows, TOKENS, 16),
            "encoder_hidden_states": draw(rows, TEXT, 32),
            "pooled_projections": draw(rows, 24),
            "timestep": torch.full((rows,), sigma),
            "img_ids": ids,
            "txt_ids": torch.zeros(TEXT, 3),
            "return_dict": False,
        }
    if name == "pixart":
        return {
            "hidden_states": draw(rows, 4, SIDE, SIDE),
            "encoder_hidden_states": draw(rows, TEXT, 24),
            "timestep": torch.full((rows,), 1000 * sigma),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }
    return {
        "hidden_states": draw(rows, 4, SIDE, SIDE),
        "encoder_hidden_states": draw(rows, TEXT, 32),
        "pooled_projections": draw(rows, 24),
        "timestep": torch.full((rows,), 1000 * sigma),
        "return_dict": False,
    }


def artifact_of(transformer: Any, seed: int = 3) -> Artifact:
    """Untrained, with tables that differ from step to step and from block to block."""
    torch.manual_seed(seed)
    artifact = Artifact.untrained(transformer, tokens=TOKENS, sigmas=SIGMAS)
    count = len(artifact.backbone.sketch)
    curve = RatioCurve((1.0, 0.2, -1.5), tuple(1.0 - 0.5 * i for i in range(count - 1)))
    for budget in artifact.tables:
        artifact.tables[budget] = ShippedTable(budget, curve, SIGMAS, TOKENS)
    return artifact


def call(transformer: Any, arguments: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**arguments)[0]


PAIR = Guidance.PAIR
GUIDANCE = {"sd3": PAIR, "sd35": PAIR, "flux": Guidance.NONE, "pixart": PAIR}


def pruned(name: str = "sd3", budget: float | None = 0.6, **config: Any) -> tuple[Any, ShivaHandle]:
    """A transformer with pruning applied; `config` are further fields of ShivaConfig."""
    transformer = make(name)
    options = {"guidance": GUIDANCE[name], **config}
    return transformer, apply_shiva(
        transformer, ShivaConfig(artifact_of(transformer), budget, **options)
    )
