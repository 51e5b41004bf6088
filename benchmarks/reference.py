# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What diffusers draws in one process: the judge of `numerics: exact`.

`CASES` covers what Stable Diffusion 3 can be asked for here; `draw` answers one of them with the
plain pipelines, in the way their documentation shows, and `WORKFLOW` is the same pipeline as ours.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image, ImageDraw


@dataclass(frozen=True)
class Control:
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Case:
    """One request. `controls` and `loras` are by declared name."""

    name: str
    prompt: str = "a red circle above a blue square"
    negative_prompt: str = ""
    seed: int = 7
    steps: int = 4
    guidance: float = 4.0
    strength: float | None = None  # given: image-to-image
    controls: Mapping[str, Control] = field(default_factory=dict[str, Control])
    loras: Mapping[str, float] = field(default_factory=dict[str, float])
    width: int | None = None
    height: int | None = None
    max_sequence_length: int = 32
    budget: float | None = None  # of a pruned setup: 1 keeps all tokens, None is its default


@dataclass(frozen=True)
class Setup:
    """A pipeline's folder, those of its ControlNets and LoRAs by name, and of its pruning artifact.

    Requests to a pruned setup run at `budget` where they name none.
    """

    path: Path
    controlnets: Mapping[str, Path] = field(default_factory=dict[str, Path])
    loras: Mapping[str, Path] = field(default_factory=dict[str, Path])
    dtype: str = "float32"
    pruning: Path | None = None
    budget: float = 1.0


def cases(setup: Setup) -> list[Case]:
    """All that this pipeline can be asked for."""
    out = [
        Case("text to image"),
        Case("another seed and negative prompt", negative_prompt="a green square", seed=11),
        Case("without guidance", guidance=1.0),
        Case("image to image", strength=0.6, steps=6),
        Case("image to image without guidance", strength=0.5, guidance=0.0),
    ]
    names = [*setup.controlnets]
    if names:
        out += [
            Case("one ControlNet", controls={names[0]: Control(0.8)}),
            Case("one ControlNet without guidance", controls={names[0]: Control()}, guidance=1.0),
            Case("one ControlNet, part of the steps", controls={names[0]: Control(0.7, 0.2, 0.8)}),
        ]
    if len(names) > 1:
        out += [
            Case("two ControlNets", controls={n: Control(0.6) for n in names[:2]}),
            Case("the other ControlNet", controls={names[1]: Control(0.9)}),
        ]
    if setup.loras:
        first, *more = setup.loras
        out += [
            Case("one LoRA", loras={first: 0.9}),
            Case("after a LoRA", seed=8),
            *([Case("two LoRAs", loras={first: 0.5, more[0]: 0.7})] if more else []),
        ]
    return out


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def picture(seed: int, size: int = 64) -> Image.Image:
    """A picture to start from or to follow: shapes on a gradient."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, size, dtype=np.uint8)
    image = Image.fromarray(np.stack([np.tile(ramp, (size, 1))] * 3, -1))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = (int(v) for v in rng.integers(0, size * 3 // 4, 2))
        color = tuple(int(v) for v in rng.integers(0, 255, 3))
        draw.ellipse((x, y, x + size // 4, y + size // 4), fill=color)
    return image


def inputs(case: Case) -> dict[str, Any]:
    """The case as the inputs of a request to the service."""
    out: dict[str, Any] = {
        "prompt": case.prompt,
        "negative_prompt": case.negative_prompt,
        "seed": case.seed,
        "steps": case.steps,
        "guidance": case.guidance,
        "max_sequence_length": case.max_sequence_length,
    }
    if case.width and case.height:
        out |= {"width": case.width, "height": case.height}
    if case.strength is not None:
        out |= {"image": png(picture(case.seed)), "strength": case.strength}
    for i, (name, control) in enumerate(case.controls.items()):
        out[f"control.{name}"] = png(picture(100 + i))
        out[f"control.{name}.scale"] = control.scale
        out[f"control.{name}.start"] = control.start
        out[f"control.{name}.end"] = control.end
    return out


def draw(setup: Setup, case: Case, change: Callable[[Any], None] | None = None) -> bytes:
    """The PNG that diffusers makes of it, from freshly loaded weights.

    `change` is done to the pipeline when pruning and LoRAs are on it.
    """
    dtype = getattr(torch, setup.dtype)
    # Without T5, diffusers wants it said twice.
    index = json.loads((setup.path / "model_index.json").read_text())
    absent = {k: None for k, v in index.items() if k.endswith("_3") and v == [None, None]}
    pipe = StableDiffusion3Pipeline.from_pretrained(setup.path, torch_dtype=dtype, **absent)
    kwargs: dict[str, Any] = {
        "prompt": case.prompt,
        "negative_prompt": case.negative_prompt,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "max_sequence_length": case.max_sequence_length,
        "generator": torch.Generator("cpu").manual_seed(case.seed),
    }
    if case.width and case.height:
        kwargs |= {"width": case.width, "height": case.height}
    if case.strength is not None:
        pipe = StableDiffusion3Img2ImgPipeline(**pipe.components)
        kwargs |= {"image": picture(case.seed), "strength": case.strength}
    if case.controls:
        nets = [
            SD3ControlNetModel.from_pretrained(setup.controlnets[name], torch_dtype=dtype)
            for name in case.controls
        ]
        many = len(nets) > 1
        pipe = StableDiffusion3ControlNetPipeline(
            **pipe.components, controlnet=nets if many else nets[0]
        )
        controls = [*case.controls.values()]
        images = [picture(100 + i) for i in range(len(nets))]
        for key, values in {
            "control_image": images,
            "controlnet_conditioning_scale": [c.scale for c in controls],
            "control_guidance_start": [c.start for c in controls],
            "control_guidance_end": [c.end for c in controls],
        }.items():
            kwargs[key] = values if many else values[0]
    if setup.pruning is not None:
        budget = setup.budget if case.budget is None else case.budget
        _prune(pipe, setup.pruning, None if budget == 1 else budget)
    for name in case.loras:
        pipe.load_lora_weights(setup.loras[name], adapter_name=name)
    if case.loras:
        pipe.set_adapters([*case.loras], [*case.loras.values()])
    if change is not None:
        change(pipe)
    pipe.set_progress_bar_config(disable=True)
    # The ControlNet pipeline draws from the global generator: docs/decisions/0001.
    torch.manual_seed(case.seed)
    return png(pipe(**kwargs).images[0])


def _prune(pipe: Any, artifact: Path, budget: float | None) -> None:
    from shiva_kernels import ShivaConfig, apply_shiva

    apply_shiva(pipe.transformer, ShivaConfig(artifact, budget, pipeline=pipe))


def workflow(setup: Setup, name: str) -> str:
    """The same pipeline as a workflow file."""
    import yaml

    spec: dict[str, Any] = {
        "pipeline": {
            "preset": "StableDiffusion3",
            "source": {"uri": f"file://{setup.path}"},
        },
        "numerics": "exact",
    }
    if setup.dtype != "float32":
        spec["pipeline"]["dtype"] = setup.dtype
    if setup.pruning is not None:
        pruning = {"artifact": {"uri": f"file://{setup.pruning}"}, "budget": f"{setup.budget:g}"}
        spec["models"] = {"transformer": {"pruning": pruning}}
    if setup.controlnets:
        spec["controlNets"] = [
            {"name": n, "source": {"uri": f"file://{p}"}} for n, p in setup.controlnets.items()
        ]
    if setup.loras:
        spec["loras"] = [
            {"name": n, "source": {"uri": f"file://{p}"}} for n, p in setup.loras.items()
        ]
    return yaml.safe_dump(
        {
            "apiVersion": "kubediffusion.io/v1alpha1",
            "kind": "DiffusionWorkflow",
            "metadata": {"name": name},
            "spec": spec,
        },
        sort_keys=False,
    )
