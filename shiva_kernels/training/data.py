# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What is trained on: a folder of pictures with captions, or scenes of the shapes world.

A source gives a batch for a seed and nothing else, so that arms see the same samples and a restart
goes on with the batch it would have had.
"""

from __future__ import annotations

import csv
import importlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from PIL import Image
from torch import Tensor

from shiva_kernels.errors import ShivaError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Batch:
    """Latents [B, C, h, w], what the captions became ([B, S, W] and [B, P]), and the captions."""

    latents: Tensor
    context: Tensor
    pooled: Tensor
    captions: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """On another device."""
        latents, context, pooled = (t.to(device) for t in (self.latents, self.context, self.pooled))
        return Batch(latents, context, pooled, self.captions)


class Source(Protocol):
    """Where batches come from. `dropout` is the share of captions left out, for guidance."""

    def batch(self, seed: int, size: int, dropout: float = 0.0) -> Batch: ...


# Kept encoded: a bound, not a policy. Captions of a folder come round again.
MAX_CAPTIONS = 4096


class Captions:
    """Caption -> the transformer's context, with an SD3 pipeline's own text encoders."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, length: int = 32) -> None:
        self.pipeline, self.length = pipeline, length
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Context [B, S, W] and pooled [B, P]; the empty caption is the one of guidance."""
        # Held here too: what a batch needs may be the oldest, which its new captions push out.
        known = {text: self._kept[text] for text in texts if text in self._kept}
        missing = list(dict.fromkeys(text for text in texts if text not in known))
        if missing:
            encode: Any = self.pipeline.encode_prompt
            context, _, pooled, _ = encode(
                prompt=missing,
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                max_sequence_length=self.length,
            )
            new = dict(zip(missing, zip(context, pooled, strict=True), strict=True))
            known |= new
            self._kept |= new
        while len(self._kept) > MAX_CAPTIONS:
            self._kept.pop(next(iter(self._kept)))
        rows = [known[text] for text in texts]
        return torch.stack([c for c, _ in rows]), torch.stack([p for _, p in rows])


class FolderSource:
    """A folder of pictures; each caption in a `.txt` beside its picture, or in `metadata.csv` or
    `metadata.jsonl` (columns `file_name` and `text`, as in Hugging Face's imagefolder).

    Latents are made once with the pipeline's autoencoder and kept in memory, in float16.
    """

    def __init__(
        self, folder: Path, pipeline: StableDiffusion3Pipeline, pixels: int, length: int = 256
    ) -> None:
        self.items = list(captioned_pictures(folder))
        if not self.items:
            raise ShivaError(
                f"{folder}: no picture with a caption; put NAME.txt beside NAME.png, or "
                "metadata.csv with the columns file_name and text"
            )
        self.captions = Captions(pipeline, length)
        self._pipeline, self._pixels = pipeline, pixels
        self._latents: dict[int, Tensor] = {}

    def batch(self, seed: int, size: int, dropout: float = 0.0) -> Batch:
        rng = random.Random(seed)
        chosen = [rng.randrange(len(self.items)) for _ in range(size)]
        texts = [_dropped(self.items[i][1], rng, dropout) for i in chosen]
        context, pooled = self.captions.encode(texts)
        latents = torch.stack([self._latent(i) for i in chosen]).float()
        return Batch(latents, context.float(), pooled.float(), tuple(texts))

    @torch.no_grad()
    def _latent(self, index: int) -> Tensor:
        if index not in self._latents:
            vae = self._pipeline.vae
            picture = read_picture(self.items[index][0], self._pixels).to(vae.device, vae.dtype)
            mean = vae.encode(picture[None]).latent_dist.mean[0]
            coded = (mean - vae.config.shift_factor) * vae.config.scaling_factor
            self._latents[index] = coded.half()
        return self._latents[index]


def read_picture(path: Path, pixels: int) -> Tensor:
    """The middle square of a picture as [3, pixels, pixels] in -1..1."""
    with Image.open(path) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side))
        array = np.asarray(square.resize((pixels, pixels), Image.Resampling.LANCZOS))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)


def captioned_pictures(folder: Path) -> Iterator[tuple[Path, str]]:
    """Pictures with their captions, by name.

    Raises:
        ShivaError: no such folder, or a list that names a picture that is not there.
    """
    if not folder.is_dir():
        raise ShivaError(f"{folder}: not a folder")
    listed = _listed(folder)
    for name, text in sorted(listed.items()):
        if not (folder / name).is_file():
            raise ShivaError(f"{folder}: metadata names {name}, which is not there")
        yield folder / name, text
    for path in sorted(folder.iterdir()):
        note = path.with_suffix(".txt")
        if path.suffix.lower() in PICTURES and path.name not in listed and note.is_file():
            yield path, note.read_text().strip()


def _listed(folder: Path) -> dict[str, str]:
    rows: list[dict[str, Any]] = []
    if (lines := folder / "metadata.jsonl").is_file():
        rows = [json.loads(line) for line in lines.read_text().splitlines() if line.strip()]
    elif (table := folder / "metadata.csv").is_file():
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
    try:
        return {row["file_name"]: row["text"] for row in rows}
    except KeyError as error:
        raise ShivaError(f"{folder}: metadata has no column {error}") from error


def _dropped(text: str, rng: random.Random, dropout: float) -> str:
    return "" if rng.random() < dropout else text


class ShapesSource:
    """Scenes of the shapes world, drawn when they are asked for.

    `trainer` is the folder that holds the world's code (`models/tiny-sd3`). Flat shapes on a flat
    ground are the easiest pictures to prune that there are: see the study's text.
    """

    def __init__(
        self,
        trainer: Path,
        pipeline: StableDiffusion3Pipeline,
        pixels: int,
        *,
        held_out: bool = False,
        pair_share: float = 0.6,
    ) -> None:
        self.world = trainer_module(trainer, "world")
        self.code = trainer_module(trainer, "vae").LatentCode.fit()
        self.captions = Captions(pipeline)
        self.pixels, self.held_out, self.pair_share = pixels, held_out, pair_share

    def batch(self, seed: int, size: int, dropout: float = 0.0) -> Batch:
        rng = random.Random(seed)
        scenes = list(islice(self._scenes(rng), size))
        drawn = np.stack([self.world.draw(scene, self.pixels) for scene in scenes])
        images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        texts = [_dropped(self.world.caption(scene, rng), rng, dropout) for scene in scenes]
        context, pooled = self.captions.encode(texts)
        return Batch(self.code.encode(images), context.float(), pooled.float(), tuple(texts))

    def _scenes(self, rng: random.Random) -> Iterator[Any]:
        while True:
            scene = self.world.sample_scene(rng, self.pair_share)
            if self.world.is_held_out(scene) == self.held_out:
                yield scene


def trainer_module(folder: Path, name: str) -> Any:
    """A module of the small model's trainer, a package named `train` in `folder`.

    Raises:
        ShivaError: it is not there.
    """
    place = str(folder.resolve())
    if not (folder / "train" / f"{name}.py").is_file():
        raise ShivaError(f"{folder}: no trainer there (train/{name}.py); give models/tiny-sd3")
    if place not in sys.path:
        sys.path.insert(0, place)
    return importlib.import_module(f"train.{name}")
