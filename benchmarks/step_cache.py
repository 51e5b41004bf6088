# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a step cache saves on tiny-sd3 at 256 pixels, alone and with pruning, a LoRA, a ControlNet.

Through the whole service: CPU time of the denoiser's process beside the same request with every
step computed at all tokens, in turn, and how far the picture is from that one. The ratios are
calibrated first, by diffusers' own calibration on other prompts and seeds.
"""

from __future__ import annotations

import asyncio
import io
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.common import Row
from benchmarks.exact import TINY
from benchmarks.reference import Case, Control, inputs

STEPS, SIDE, BUDGET, THRESHOLD = 28, 256, 0.6, 0.06
LARGE = TINY.parent / "tiny-sd3-256"
CALIBRATION = ("a green triangle", "a blue cross above a red square", "two circles")
REQUESTS = (
    Case("text", seed=1),
    Case("LoRA", seed=2, loras={"outline": 1.0}),
    Case("ControlNet", seed=3, controls={"edges": Control(0.8)}),
)


@dataclass(frozen=True)
class Way:
    """How requests are sped up."""

    name: str
    workflow: str
    budget: float


DENSE = Way("all computed", "plain", 1.0)
WAYS = (
    Way("cache", "cached", 1.0),
    Way(f"budget {BUDGET:g}", "plain", BUDGET),
    Way(f"cache and budget {BUDGET:g}", "cached", BUDGET),
)


def calibrated() -> tuple[float, ...]:
    """MagCache's ratios of the transformer, means over `CALIBRATION`."""
    import torch
    from diffusers.hooks.mag_cache import MagCacheConfig, apply_mag_cache

    from shiva_kernels.training.assemble import load_pipeline

    found: list[list[float]] = []
    for seed, prompt in enumerate(CALIBRATION, 100):
        pipe = load_pipeline(TINY / "pipeline", LARGE / "transformer")
        # A step more than there are: with the last one it would forget what it measured.
        apply_mag_cache(pipe.transformer, MagCacheConfig(calibrate=True, num_inference_steps=99))
        hook = pipe.transformer.transformer_blocks[0]._diffusers_hook.hooks
        state: Any = next(iter(hook.values())).state_manager
        pipe(
            prompt,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            width=SIDE,
            height=SIDE,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )
        [kept] = state._state_cache.values()
        found.append(kept.calibration_ratios)
    return tuple(round(float(value), 4) for value in np.mean(found, axis=0))


def workflows(folder: Path, ratios: tuple[float, ...], threshold: float) -> list[Path]:
    """The same models, with and without a cache."""
    steps = {"threshold": f"{threshold:g}", "ratios": [f"{ratio:g}" for ratio in ratios]}
    spec: dict[str, Any] = {
        "pipeline": {"preset": "StableDiffusion3", "source": {"uri": f"file://{TINY}/pipeline"}},
        "numerics": "fast",
        "models": {
            "transformer": {
                "source": {"uri": f"file://{LARGE}", "subfolder": "transformer"},
                "pruning": {"artifact": {"uri": f"file://{LARGE}/pruning"}},
            }
        },
        "controlNets": [
            {"name": "edges", "source": {"uri": f"file://{TINY}/controlnets/edges"}},
        ],
        "loras": [{"name": "outline", "source": {"uri": f"file://{TINY}/loras/outline"}}],
    }
    files = []
    for name, more in (("plain", {}), ("cached", {"caching": {"steps": steps}})):
        head = {"apiVersion": "kubediffusion.io/v1alpha1", "kind": "DiffusionWorkflow"}
        text = {**head, "metadata": {"name": name}, "spec": {**spec, **more}}
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(text))
    return files


Drawn = dict[tuple[str, str], tuple[list[float], np.ndarray]]


async def _measured(files: list[Path], rounds: int) -> Drawn:
    """By (request, way): CPU seconds of the denoiser, and the picture."""
    import psutil
    from PIL import Image

    from kubediffusion.client.core import build_request
    from kubediffusion.local.runtime import LocalRuntime

    seconds: dict[tuple[str, str], list[float]] = {}
    pictures: dict[tuple[str, str], np.ndarray] = {}
    async with LocalRuntime(files) as runtime:
        await runtime.ready()
        reports = runtime.supervisor.reports()
        denoiser = psutil.Process(next(r.pid for r in reports if r.name == "denoiser"))

        async def draw(case: Case, way: Way) -> float:
            given = inputs(case) | {"steps": STEPS, "width": SIDE, "height": SIDE}
            before = denoiser.cpu_times()
            request = build_request(
                way.workflow, "", inputs=given, loras=case.loras, budget=way.budget
            )
            async for event in runtime.generate(request):
                if event.WhichOneof("kind") == "image":
                    image = Image.open(io.BytesIO(event.image.png))
                    pictures[case.name, way.name] = np.asarray(image, np.float64)
            after = denoiser.cpu_times()
            return after.user + after.system - before.user - before.system

        for number in range(-1, rounds):  # the first warms up
            for case in REQUESTS:
                for way in (DENSE, *WAYS)[:: 1 if number % 2 else -1]:
                    spent = await draw(case, way)
                    if number >= 0:
                        seconds.setdefault((case.name, way.name), []).append(spent)
    return {key: (seconds[key], pictures[key]) for key in seconds}


def run(rounds: int) -> list[Row]:
    """Rows of CPU seconds with (ours) and without (peer) a cache, a budget, both."""
    from kubediffusion.workflow import StepCache, computed_share

    ratios, threshold = calibrated(), THRESHOLD
    print("ratios:", ", ".join(f"{ratio:g}" for ratio in ratios))
    share = computed_share(StepCache("magcache", threshold, ratios, 3, 0.2), STEPS)
    with tempfile.TemporaryDirectory() as name:
        found = asyncio.run(_measured(workflows(Path(name), ratios, threshold), rounds))
    rows = []
    for case in REQUESTS:
        dense, truth = found[case.name, DENSE.name]
        for way in WAYS:
            times, picture = found[case.name, way.name]
            computed = round(share * STEPS) if way.workflow == "cached" else STEPS
            rows.append(
                Row(
                    "step-cache",
                    f"tiny-sd3, {SIDE} px, {case.name}: {way.name}",
                    statistics.median(times),
                    statistics.median(dense),
                    "CPU s",
                    "",
                    None,
                    rounds,
                    f"{computed} of {STEPS} steps computed; {_psnr(picture, truth):.1f} dB",
                )
            )
    return rows


def _psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    error = float(np.mean((picture - truth) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")
