# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Measure the ControlNet and the LoRA with the saved pipeline, each beside the pipeline without."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import (
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)
from numpy.typing import NDArray
from PIL import Image

from train.checker import silhouette_overlap
from train.evaluate import (
    Case,
    Painter,
    held_out_cases,
    judge,
    paint,
    pipeline_painter,
    sheet,
    summarize,
)
from train.world import Scene, draw

OPTIONS: dict[str, Any] = {"num_inference_steps": 28, "guidance_scale": 4.0}
SAMPLES = 8
Item = TypeVar("Item")


def mixed_cases(count: int, *, vague: bool) -> list[Case]:
    """As many captions of one object as of two."""
    half = count // 2
    return [
        *held_out_cases(half, objects=1, vague=vague),
        *held_out_cases(count - half, objects=2, vague=vague),
    ]


def edge_images(wanted: Sequence[Scene], pixels: int) -> NDArray[np.uint8]:
    """The control images of scenes."""
    return np.stack([draw(replace(scene, style="edges"), pixels) for scene in wanted])


def control_painter(folder: Path, controlnet: Path, **options: Any) -> Painter:
    """Paint with the edges of the wanted scene as the control."""
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
        folder, controlnet=SD3ControlNetModel.from_pretrained(controlnet)
    )
    pipeline.set_progress_bar_config(disable=True)
    pixels = pipeline.transformer.config.sample_size * 8

    def painter(
        texts: list[str], wanted: list[Scene], generator: torch.Generator
    ) -> NDArray[np.uint8]:
        out = pipeline(
            texts,
            control_image=[Image.fromarray(lines) for lines in edge_images(wanted, pixels)],
            height=pixels,
            width=pixels,
            generator=generator,
            output_type="np",
            **options,
        )
        return np.rint(out.images * 255).astype(np.uint8)

    return painter


def measure_control(
    folder: Path, controlnet: Path, results: Path, count: int, length: int
) -> dict[str, Any]:
    """Captions without places, and the caption "shapes": with edges, and without for contrast."""
    options = OPTIONS | {"max_sequence_length": length}
    with_edges = control_painter(folder, controlnet, **options)
    base = StableDiffusion3Pipeline.from_pretrained(folder)
    without = pipeline_painter(base, **options)
    cases = mixed_cases(count, vague=True)
    bare = [replace(case, text="shapes") for case in cases]
    report: dict[str, Any] = {**options}
    shown = [edge_images([case.scene for case in _spread(cases)], 128)]
    for name, asked in (("no_places", cases), ("shapes", bare)):
        for kind, painter in (("with_edges", with_edges), ("without", without)):
            pictures = paint(asked, painter)
            pairs = zip(pictures, asked, strict=True)
            overlaps = [silhouette_overlap(picture, case.scene) for picture, case in pairs]
            row: dict[str, Any] = {"images": len(asked), "overlap": float(np.mean(overlaps))}
            if name == "no_places":  # "shapes" leaves colours open: only outlines can be judged
                row |= summarize(judge(asked, pictures))
            report[f"{name}_{kind}"] = row
            print(f"{name}_{kind}: {row}", flush=True)
            shown.append(np.stack(_spread(list(pictures))))
    return _write(report, np.concatenate(shown), results, "controlnet")


def measure_lora(
    folder: Path, lora: Path, results: Path, count: int, length: int
) -> dict[str, Any]:
    """Full captions, judged as outlines, with the LoRA and without."""
    options = OPTIONS | {"max_sequence_length": length}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    painter = pipeline_painter(pipeline, **options)
    cases = mixed_cases(count, vague=False)
    outlined = [replace(case, scene=replace(case.scene, style="outline")) for case in cases]
    few = _spread(outlined)
    before = paint(few, painter)
    pipeline.load_lora_weights(str(lora))
    pictures = paint(outlined, painter)
    report: dict[str, Any] = {
        **options,
        "without_lora_judged_as_outlines": summarize(judge(few, before)),
        "with_lora_judged_as_outlines": summarize(judge(outlined, pictures)),
        "with_lora_judged_as_filled": summarize(judge(cases, pictures)),
    }
    print(report, flush=True)
    shown = np.concatenate([before, np.stack(_spread(list(pictures)))])
    return _write(report, shown, results, "lora")


def _spread(items: list[Item]) -> list[Item]:
    """A few from the one-object half and a few from the two-object half."""
    half = len(items) // 2
    return items[: SAMPLES // 2] + items[half : half + SAMPLES // 2]


def _write(
    report: dict[str, Any], pictures: NDArray[np.uint8], results: Path, name: str
) -> dict[str, Any]:
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    sheet(pictures, SAMPLES, results / f"{name}_samples.png")
    return report
