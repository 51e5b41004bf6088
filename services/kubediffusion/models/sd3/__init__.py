# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5.

The arithmetic and its order are those of diffusers' StableDiffusion3Pipeline and its
image-to-image and ControlNet siblings; what this family adds is that the loop's state lives in a
`Sd3Denoising`, can be stopped between any two steps, and goes on elsewhere with the same bits.

    transformer    the denoiser: a step of one request, or of several together
    denoising      a request between two steps
    conditioning   what of a request stays the same over all steps
    controlnet     ControlNets, which the denoiser calls at each step
    sampling       the timesteps, and the latents before the first of them
"""

from __future__ import annotations

from typing import Any

from kubediffusion.errors import UnsupportedModel
from kubediffusion.models.autoencoder import Autoencoder
from kubediffusion.models.base import Family, LoadSpec, Model
from kubediffusion.models.sd3.controlnet import Sd3ControlNet
from kubediffusion.models.sd3.transformer import Sd3Transformer
from kubediffusion.models.text import ClipEncoder, T5Encoder

_LOADERS: dict[str, Any] = {
    "text_encoder": ClipEncoder,
    "text_encoder_2": ClipEncoder,
    "text_encoder_3": T5Encoder,
    "transformer": Sd3Transformer,
    "vae": Autoencoder,
    "controlnet": Sd3ControlNet,
}


def _load(spec: LoadSpec) -> Model:
    asked = ("pruning",) if spec.pruning_path is not None else ()
    asked += ("compile",) if "compile" in spec.options else ()
    if asked and spec.component != "transformer":
        raise UnsupportedModel(
            f"a {spec.component} of this family cannot do that; its transformer can",
            field=asked[0],
        )
    return _LOADERS[spec.component](spec)


SD3 = Family("sd3", tuple(_LOADERS), _load)
