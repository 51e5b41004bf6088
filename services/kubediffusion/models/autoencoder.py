# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The VAE: pictures into latents for image-to-image and ControlNets, latents into pictures."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image, ImageOps

from kubediffusion.errors import InvalidInput, UnsupportedModel
from kubediffusion.models.base import LoadSpec, Lora, PortValue
from kubediffusion.models.loading import load_module, nbytes_of
from kubediffusion.models.random import generator_of, state_of

# What Pillow's decoders raise on torn or hostile bytes.
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    IndexError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Autoencoder:
    """Stages `encode_image` and `decode` of an AutoencoderKL with scale and shift."""

    stages = ("encode_image", "decode")

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self._module: Any = load_module(spec, AutoencoderKL)
        if self._module.config.shift_factor is None:
            raise UnsupportedModel(
                f"{spec.path} has no shift_factor in its config.json: it is the VAE of another "
                "family of models; check the source and subfolder",
                reason="WrongArchitecture",
            )
        self._scale_factor = 2 ** (len(self._module.config.block_out_channels) - 1)
        self._processor: Any = VaeImageProcessor(vae_scale_factor=self._scale_factor)

    @property
    def facts(self) -> Mapping[str, str | int | float | bool]:
        channels = int(self._module.config.latent_channels)
        return {"vae_scale_factor": self._scale_factor, "latent_channels": channels}

    @property
    def nbytes(self) -> int:
        return nbytes_of(self._module)

    def run(
        self, stage: str, inputs: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> Mapping[str, PortValue]:
        with torch.inference_mode():
            return self._decode(inputs) if stage == "decode" else self._encode(inputs)

    def unload(self) -> None:
        del self._module

    def _decode(self, inputs: Mapping[str, PortValue]) -> Mapping[str, PortValue]:
        """`latents` (1, C, h, w) -> `image` uint8 (H, W, 3)."""
        latents = inputs.get("latents")
        if not isinstance(latents, torch.Tensor):
            raise InvalidInput("stage 'decode' takes a tensor", field="latents")
        config = self._module.config
        # A denoiser may have another dtype.
        latents = latents.to(self._module.device, self._module.dtype)
        latents = (latents / config.scaling_factor) + config.shift_factor
        image = self._module.decode(latents, return_dict=False)[0]
        return {"image": np.asarray(self._processor.postprocess(image, output_type="pil")[0])}

    def _encode(self, inputs: Mapping[str, PortValue]) -> Mapping[str, PortValue]:
        """`image` bytes -> `latents` (branches, C, h, w), and the `generator` after the draw.

        `mode` "init" draws the posterior's sample from the generator that will draw the noise;
        "control" from one of its own, with a sample for each CFG branch (docs/decisions/0001).
        """
        control = inputs.get("mode") == "control"
        pixels = self._pixels(inputs)
        if control:
            # The ControlNet pipeline repeats its image in this way, which also makes it contiguous:
            # a convolution's last bits depend on the memory format.
            pixels = pixels.repeat_interleave(1, dim=0)
            pixels = torch.cat([pixels] * int(_number(inputs, "branches", 1)))
        given = inputs.get("generator")
        generator = generator_of(given if given is not None else inputs.get("seed"))
        latents = self._module.encode(pixels).latent_dist.sample(generator)
        config = self._module.config
        shift = 0 if control and inputs.get("shift") is False else config.shift_factor
        latents = (latents - shift) * config.scaling_factor
        return {"latents": latents, "generator": state_of(generator)}

    def _pixels(self, inputs: Mapping[str, PortValue]) -> torch.Tensor:
        data = inputs.get("image")
        if not isinstance(data, bytes):
            raise InvalidInput("stage 'encode_image' takes an encoded image", field="image")
        try:
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
            # A phone writes down how it was held; `load_image` of diffusers heeds it too.
            image = ImageOps.exif_transpose(image).convert("RGB")
        except _UNREADABLE as error:
            raise InvalidInput(
                f"no PNG, JPEG or WebP picture can be read from it: {error}", field="image"
            ) from error
        width, height = int(_number(inputs, "width")), int(_number(inputs, "height"))
        pixels = self._processor.preprocess(image, height=height, width=width)
        return pixels.to(device=self._module.device, dtype=self._module.dtype)


def _number(inputs: Mapping[str, PortValue], name: str, default: int | None = None) -> float:
    value = inputs.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInput("it must be a number", field=name)
    return value
