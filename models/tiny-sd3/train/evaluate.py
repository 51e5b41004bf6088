# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Draw held-out captions with a saved pipeline, and count what is right."""

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from numpy.typing import NDArray
from PIL import Image

from train.checker import Verdict, check
from train.common import PIXELS
from train.world import Scene, caption, scenes

Painter = Callable[[list[str], list[Scene], torch.Generator], NDArray[np.uint8]]

CAPTION_SEED = 777
BATCH = 16


@dataclass(frozen=True)
class Case:
    """A caption and the scene it must give."""

    text: str
    scene: Scene


def held_out_cases(count: int, *, objects: int, vague: bool = False) -> list[Case]:
    """Captions of scenes whose combinations were kept from training."""
    stream = scenes(CAPTION_SEED + objects, held_out=True, pair_share=float(objects == 2))
    rng = random.Random(CAPTION_SEED)
    return [Case(caption(scene, rng, vague=vague), scene) for scene in islice(stream, count)]


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share."""
    if not count:
        return 0.0, 1.0
    z, share = 1.96, right / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (middle - spread) / scale, (middle + spread) / scale


def paint(cases: Sequence[Case], painter: Painter, seed: int = 0) -> NDArray[np.uint8]:
    """All pictures, in batches with a generator of their own, so that a part can be repeated."""
    pictures = []
    for start in range(0, len(cases), BATCH):
        part = cases[start : start + BATCH]
        generator = torch.Generator("cpu").manual_seed(seed + start)
        texts, wanted = [case.text for case in part], [case.scene for case in part]
        pictures.append(painter(texts, wanted, generator))
    return np.concatenate(pictures)


def summarize(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Shares of what is right."""
    count, right = len(verdicts), sum(verdict.right for verdict in verdicts)
    parts = [asdict(verdict) for verdict in verdicts]
    return {
        "images": count,
        "right": right / count,
        "interval_95": [round(bound, 4) for bound in wilson(right, count)],
        **{key: sum(part[key] for part in parts) / count for key in parts[0]},
    }


def pipeline_painter(pipeline: StableDiffusion3Pipeline, **options: Any) -> Painter:
    """Paint with a pipeline; options go to its call."""
    pipeline.set_progress_bar_config(disable=True)

    def painter(
        texts: list[str], wanted: list[Scene], generator: torch.Generator
    ) -> NDArray[np.uint8]:
        del wanted
        images = pipeline(texts, generator=generator, output_type="np", **options).images
        return np.rint(images * 255).astype(np.uint8)

    return painter


def judge(
    cases: Sequence[Case], pictures: NDArray[np.uint8], *, anywhere: bool = False
) -> list[Verdict]:
    """One verdict a picture."""
    pairs = zip(cases, pictures, strict=True)
    return [check(picture, case.scene, anywhere=anywhere) for case, picture in pairs]


def sheet(pictures: NDArray[np.uint8], columns: int, path: Path) -> None:
    """Save pictures side by side."""
    gap, columns = 2, min(columns, len(pictures))
    padded = np.pad(pictures, ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=200)
    rows = [np.concatenate(list(row), 1) for row in _rows(padded, columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, 0)).save(path, optimize=True)


def _rows(pictures: NDArray[np.uint8], columns: int) -> list[NDArray[np.uint8]]:
    whole = len(pictures) - len(pictures) % columns
    return [pictures[start : start + columns] for start in range(0, whole, columns)]


def load_at(folder: Path, pixels: int) -> StableDiffusion3Pipeline:
    """The pipeline, with the transformer of larger pictures where these are not its own."""
    larger = folder.parent.parent / f"tiny-sd3-{pixels}" / "transformer"
    if not larger.exists():
        return StableDiffusion3Pipeline.from_pretrained(folder)
    transformer = SD3Transformer2DModel.from_pretrained(larger)
    return StableDiffusion3Pipeline.from_pretrained(folder, transformer=transformer)


def evaluate_pipeline(
    folder: Path,
    results: Path,
    count: int,
    steps: int,
    guidance: float,
    length: int,
    pixels: int = PIXELS,
) -> dict[str, Any]:
    """Measure one and two objects; writes a JSON file and a sheet of samples."""
    pipeline = load_at(folder, pixels)
    options = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "max_sequence_length": length,
    }
    report: dict[str, Any] = {**options, "captions": "held out", "seed": 0}
    samples = []
    for objects, name in ((1, "one_object"), (2, "two_objects")):
        cases = held_out_cases(count, objects=objects)
        began = time.monotonic()
        pictures = paint(cases, pipeline_painter(pipeline, **options))
        seconds = (time.monotonic() - began) / count
        verdicts = judge(cases, pictures)
        report[name] = summarize(verdicts) | {"seconds_per_image": round(seconds, 3)}
        failures = zip(cases, verdicts, strict=True)
        report[name]["failed"] = [case.text for case, verdict in failures if not verdict.right]
        samples.append(pictures[: 16 * objects * PIXELS // pixels])
        print(f"{name}: {report[name]}", flush=True)
    results.mkdir(parents=True, exist_ok=True)
    size = "" if pixels == PIXELS else f"_{pixels}px"
    path = results / f"evaluation_{length}{size}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    sheet(np.concatenate(samples), 8, results / f"samples_{length}{size}.png")
    return report
