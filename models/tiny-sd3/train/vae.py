# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The autoencoder: a fixed linear latent code, and an `AutoencoderKL` that learns both its ways.

The latent of an 8 x 8 patch is its 16 strongest principal components. The code is known before any
training, so that the flow model, the decoder and the encoder can be trained at the same time, and
an encoder's flaws cannot limit what the flow model may draw.
"""

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from train.common import (
    CHANNELS,
    PIXELS,
    VAE_FACTOR,
    Averages,
    Budget,
    CurveLog,
    flat_then_linear,
    load_checkpoint,
    save_checkpoint,
    set_rate,
    to_tensor,
)
from train.world import Scene, Style, draw, scenes

# Filled shapes most of the time; outlines and edge maps so that styles and controls can be coded.
STYLES: tuple[Style, ...] = ("filled", "filled", "filled", "outline", "edges")
WHITENING = 0.6  # 0: variances as they are, 1: all equal; edges must not drown in the noise
LATENT_NOISE = 0.3  # the decoder learns to tidy a sampler's errors up to this
CROP_CELLS = 6
POSTERIOR_LOGVAR = -9.0
SCENE_POOL = 2500
RATE = 1e-3


def styled_scenes(seed: int, count: int) -> list[Scene]:
    """Training scenes in all styles."""
    stream = islice(scenes(seed, held_out=False), count)
    return [replace(scene, style=STYLES[i % len(STYLES)]) for i, scene in enumerate(stream)]


class LatentCode:
    """A partly whitened PCA of 8 x 8 patches."""

    def __init__(self, projection: torch.Tensor) -> None:
        self.projection = projection  # (192, 16)

    @classmethod
    def fit(cls, seed: int = 5, count: int = 1500) -> "LatentCode":
        """Find the components of `count` scenes; the overall variance of the code is 1."""
        images = np.stack([draw(scene, PIXELS) for scene in styled_scenes(seed, count)])
        patches = _patches(to_tensor(images)).flatten(0, 2).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        values, vectors = values.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
        # A component's sign is arbitrary: fix it, or the code changes between machines.
        peaks = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        projection = vectors * peaks.sign() * values.sqrt().pow(-WHITENING)
        spread = (patches @ projection).square().mean().sqrt()
        return cls((projection / spread).float())

    @classmethod
    def at(cls, path: Path) -> "LatentCode":
        """The code kept in a file, fitted on the first call."""
        if not path.exists():
            torch.save(cls.fit().projection, path)
        return cls(torch.load(path, weights_only=True))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, h, w) to (n, 16, h / 8, w / 8)."""
        return (_patches(images) @ self.projection).permute(0, 3, 1, 2).contiguous()


def _patches(images: torch.Tensor) -> torch.Tensor:
    count, _, height, width = images.shape
    rows, columns = height // VAE_FACTOR, width // VAE_FACTOR
    cut = images.reshape(count, 3, rows, VAE_FACTOR, columns, VAE_FACTOR)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(count, rows, columns, -1)


def make_vae() -> AutoencoderKL:
    """The architecture, near to linear at the start."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=CHANNELS,
        sample_size=PIXELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        scaling_factor=1.0,  # the code's variance is 1 already
        shift_factor=0.0,
    )
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(cast(nn.Conv2d, module).weight)
            nn.init.zeros_(cast(nn.Conv2d, module).bias)
    head = vae.encoder.conv_out  # mean and log-variance; the variance is fixed and tiny
    with torch.no_grad():
        head.weight[CHANNELS:] = 0
        head.bias[CHANNELS:] = POSTERIOR_LOGVAR
    return vae.to(memory_format=torch.channels_last)


class PatchPool:
    """Drawn scenes, served as whole pictures or as crops around an object's edge."""

    def __init__(self, seed: int, code: LatentCode) -> None:
        self.scenes = styled_scenes(seed, SCENE_POOL)
        self.images = np.stack([draw(scene, PIXELS) for scene in self.scenes])
        self.code, self.rng = code, random.Random(seed)

    def whole(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures and their latents."""
        chosen = [self.rng.randrange(len(self.scenes)) for _ in range(count)]
        return self._coded(self.images[chosen])

    def crops(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops, aligned to the code's patches, and their latents."""
        return self._coded(np.stack([self._crop() for _ in range(count)]))

    def _crop(self) -> np.ndarray:
        index = self.rng.randrange(len(self.scenes))
        thing = self.rng.choice(self.scenes[index].things)
        size, cells = CROP_CELLS * VAE_FACTOR, PIXELS // VAE_FACTOR
        corner = []
        for middle in (thing.y, thing.x):
            at = (middle + self.rng.uniform(-1.1, 1.1) * thing.radius) * cells - CROP_CELLS / 2
            corner.append(min(max(round(at), 0), cells - CROP_CELLS) * VAE_FACTOR)
        top, left = corner
        return self.images[index, top : top + size, left : left + size]

    def _coded(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = to_tensor(images)
        return pictures.to(memory_format=torch.channels_last), self.code.encode(pictures)


def decoder_loss(vae: AutoencoderKL, pictures: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Repaint pictures from latents with noise of a random strength; edges count most."""
    strength = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        painted = vae.decode(latents + strength * torch.randn_like(latents)).sample.float()
    error = (painted - pictures).abs()
    local = nn.functional.avg_pool2d(pictures, 5, stride=1, padding=2, count_include_pad=False)
    weight = 1 + 8 * ((pictures - local).abs().amax(1, keepdim=True) > 0.05)
    return (weight * (error + error.square())).mean() / weight.float().mean()


def encoder_loss(vae: AutoencoderKL, pictures: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Distance of the posterior's mean from the code."""
    with torch.autocast("cpu", torch.bfloat16):
        mean = vae.encode(pictures).latent_dist.mean.float()
    error = mean - latents
    return nn.functional.smooth_l1_loss(error, torch.zeros_like(error), beta=0.1)


class VaeTrainer:
    """Trains one part, "decoder" or "encoder", in this process."""

    def __init__(self, work: Path, part: str, minutes: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.part = part
        self.vae, self.path = make_vae(), work / f"vae_{part}.pt"
        self.module: nn.Module = self.vae.decoder if part == "decoder" else self.vae.encoder
        self.loss = decoder_loss if part == "decoder" else encoder_loss
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0
        )
        state = load_checkpoint(self.path)
        if state:
            self.module.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"] if state else 0
        self.pool = PatchPool(seed + 100 + self.step, LatentCode.at(work / "latent_code.pt"))
        self.budget = Budget(minutes, state["spent"] if state else 0.0)
        self.log = CurveLog(work / "logs" / f"vae_{part}.csv", part, append=bool(state))

    def run(self) -> None:
        """Train until the time is used up."""
        averages = Averages()
        while self.budget.progress < 1:
            rate = RATE * flat_then_linear(self.budget.progress)
            set_rate([self.optimizer], rate * min(1, (self.step + 1) / 50))
            # Group norm sees other statistics in whole pictures than in crops: train on both.
            whole = self.step % 3 == 2
            averages.add(**{"whole" if whole else "crop": self._train_step(whole)})
            self.step += 1
            if self.step % 50 == 0:
                self.log.write(self.budget, step=self.step, **averages.take())
            if self.step % 200 == 0:
                self.save()
        self.save()

    def _train_step(self, whole: bool) -> float:
        pictures, latents = self.pool.whole(3) if whole else self.pool.crops(20)
        loss = self.loss(self.vae, pictures, latents)
        self.optimizer.zero_grad()
        loss.backward()
        if self.part == "encoder":  # the variance stays as it was set
            for parameter in self.vae.encoder.conv_out.parameters():
                parameter.grad[CHANNELS:] = 0
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def save(self) -> None:
        """Keep everything a restart needs."""
        save_checkpoint(
            self.path,
            model=self.module.state_dict(),
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            spent=self.budget.elapsed,
        )


def train_vae(work: Path, part: str, minutes: float, seed: int) -> None:
    """Train the decoder or the encoder; a second call continues where the first ended."""
    torch.set_num_threads(1)
    VaeTrainer(work, part, minutes, seed).run()


def load_vae(work: Path) -> AutoencoderKL:
    """The autoencoder with whatever is trained so far."""
    vae = make_vae()
    for part, module in (("decoder", vae.decoder), ("encoder", vae.encoder)):
        state = load_checkpoint(work / f"vae_{part}.pt")
        if state:
            module.load_state_dict(state["model"])
    return vae.eval()
