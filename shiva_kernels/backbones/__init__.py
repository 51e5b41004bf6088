# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The architectures that can be pruned, one file each."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from shiva_kernels.backbones.base import Backbone as Backbone
from shiva_kernels.backbones.base import Widths as Widths
from shiva_kernels.backbones.base import blocks_of as blocks_of
from shiva_kernels.backbones.flux import Flux
from shiva_kernels.backbones.pixart import PixArt
from shiva_kernels.backbones.sd3 import Sd3
from shiva_kernels.errors import Unsupported

_BACKBONES: dict[type, Backbone] = {
    SD3Transformer2DModel: Sd3(),
    FluxTransformer2DModel: Flux(),
    PixArtTransformer2DModel: PixArt(),
}


def backbone_of(transformer: Any) -> Backbone:
    """Raises Unsupported for an architecture that is not here."""
    try:
        return _BACKBONES[type(transformer)]
    except KeyError:
        known = ", ".join(cls.__name__ for cls in _BACKBONES)
        raise Unsupported(
            f"{type(transformer).__name__} cannot be pruned; supported are {known}"
        ) from None
