# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The twelve published workflows, the seven settings, and profiles as the artifact publishes them.

Source of the figures: the LegoDiffusion/DiFlow artifact (arXiv 2604.08123), measured on H800 80 GB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kubediffusion.errors import InvalidInput
from kubediffusion.scheduling.costs import Costs, Link, ModelCosts, Run
from kubediffusion.scheduling.pipelines import Pipeline, Sizes
from kubediffusion.scheduling.policies.diflow import Tables
from kubediffusion.simulate.workload import Families

GB = 1e9
GIB = 2.0**30
GPU_BYTES = 85 * GB
# 85 % of the accelerator, less an arena for tensors of 8 GiB.
NODE_BYTES = 0.85 * GPU_BYTES - 8 * GIB
# What the activations of the largest forward take, kept free by planned residency.
ACTIVATION_BYTES = 5 * GB
# Whole pipelines as the artifact's Clockwork baseline accounts them, and its limit.
MONOLITH_BYTES = 71 * GIB
_MONOLITH_GIB = {"sd3": (23, 25), "sd35": (35, 40), "dev": (38, 40), "schnell": (38, 40)}

_SD_TEXT = ("T5", "CLIP_L", "CLIP_G")
_FLUX_TEXT = ("T5_Flux", "CLIP_Flux")
_SD = {
    "encoders": _SD_TEXT,
    "steps": 28,
    "sampler": "FlowMatchEulerDiscreteScheduler",
    "latents": "LatentsGenerator",
}
_FLUX = {
    "encoders": _FLUX_TEXT,
    "together": False,
    "decoder": "Flux1VAE",
    "latents": "FluxLatentsGenerator",
    "sampler": "FluxFlowMatchEulerDiscreteScheduler",
}
_FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, str], int]] = {
    "sd3": (
        {**_SD, "denoiser": "StableDiffusion3", "decoder": "StableDiffusion3VAE"},
        ("StableDiffusion3ControlNetCanny", "StableDiffusion3ControlNetPose"),
        6,
    ),
    "sd35": (
        {**_SD, "denoiser": "StableDiffusion35Large", "decoder": "StableDiffusion35LargeVAE"},
        ("StableDiffusion35LargeControlNetCanny", "StableDiffusion35LargeControlNetDepth"),
        6,
    ),
    "dev": (
        {**_FLUX, "denoiser": "Flux1Dev", "steps": 50},
        ("Flux1DevControlNetCanny", "Flux1DevControlNetDepth"),
        2,
    ),
    "schnell": (
        {**_FLUX, "denoiser": "Flux1Schnell", "steps": 4},
        ("Flux1DevControlNetCanny", "Flux1DevControlNetDepth"),
        2,
    ),
}


def published_family(name: str) -> dict[str, Pipeline]:
    """A: text to image; B and C: with one of two ControlNets."""
    common, controls, residuals = _FAMILIES[name]
    plain = Pipeline(f"{name}/A", name, **common)
    sizes = Sizes(residuals=residuals)
    with_control = {
        label: replace(plain, name=f"{name}/{label}", controls=(control,), sizes=sizes)
        for label, control in zip("BC", controls, strict=True)
    }
    return {"A": plain, **with_control}


@dataclass(frozen=True, slots=True)
class Setting:
    """GPUs in hosts of `gpus_per_host`, and the workflows that they serve."""

    name: str
    gpus: int
    families: Families
    gpus_per_host: int = 8
    node_bytes: float = NODE_BYTES
    activation_bytes: float = ACTIVATION_BYTES
    monolith_bytes: float = MONOLITH_BYTES
    slo_scale: float = 2.0
    # Bytes of a whole pipeline as a swapping monolith accounts them; else the sum of its models.
    pipeline_bytes: Mapping[str, float] = field(default_factory=dict[str, float])


def _families(*names: str, weights: Mapping[str, float] | None = None) -> Families:
    pipelines = {name: published_family(name) for name in names}
    return Families(pipelines, weights or dict.fromkeys(names, 1.0))


_ALL = ("sd3", "sd35", "dev", "schnell")
_SETTINGS: dict[str, tuple[int, tuple[str, ...]]] = {
    "S-a": (8, ("schnell",)),
    "S-b": (8, ("sd3",)),
    "S-c": (16, ("sd3", "sd35")),
    "S-d": (16, _ALL),
    "S-e": (32, _ALL),
    "S-f": (8, ("sd35",)),
    "S-g": (16, ("dev",)),
}
SETTINGS = tuple(_SETTINGS)


def published_setting(name: str) -> Setting:
    """One of S-a to S-g. Raises InvalidInput for another name."""
    if name not in _SETTINGS:
        raise InvalidInput(
            f"there is no setting '{name}': take one of {', '.join(SETTINGS)}, or give a file"
        )
    gpus, families = _SETTINGS[name]
    nbytes = {
        f"{family}/{label}": _MONOLITH_GIB[family][label != "A"] * GIB
        for family in families
        for label in "ABC"
    }
    return Setting(name, gpus, _families(*families), pipeline_bytes=nbytes)


def costs_of(models: Mapping[str, Any], transfers: Mapping[str, Any]) -> Costs:
    """From the content of `model_profiles.json` and `transfer_profiles.json`.

    Raises InvalidInput where a profile lacks what is needed, with its name.
    """
    try:
        table = {name: _model(entry) for name, entry in models["models"].items()}
        same, cross = (_link(transfers.get(key, ())) for key in ("same_host", "cross_host"))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"the profiles are not as expected: {type(error).__name__} {error}; "
            "models.NAME needs load.host_to_gpu_s, load.gpu_bytes and execution[]"
        ) from error
    return Costs(table, same, cross)


def _model(entry: Mapping[str, Any]) -> ModelCosts:
    runs: dict[str, list[Run]] = {}
    for each in entry["execution"]:
        run = Run(int(each["batch"]), float(each["seconds"]), float(each.get("gpu_bytes", 0.0)))
        runs.setdefault(each.get("mode", "default"), []).append(run)
    load = entry["load"]
    by_mode = {mode: tuple(sorted(each, key=lambda run: run.batch)) for mode, each in runs.items()}
    return ModelCosts(float(load["host_to_gpu_s"]), float(load["gpu_bytes"]), by_mode)


def _link(rows: Sequence[Sequence[float]]) -> Link:
    """Rows of bytes, microseconds to make room, microseconds to fetch."""
    return Link(tuple(sorted((row[0], row[-1] * 1e-6) for row in rows)))


def tables_of(content: Mapping[str, Any]) -> Tables:
    """From the content of `scheduler_tables.json`; the medians name kinds of operators."""
    batches = {
        name: (int(modes["latency_mode"]), int(modes["throughput_mode"]))
        for name, modes in content.get("max_batch", {}).items()
    }
    medians = {name: float(value) for name, value in content.get("op_latency_median", {}).items()}
    for kind, models in _SAME_MEDIAN.items():
        if kind in medians:
            medians |= dict.fromkeys(models, medians[kind])
    return Tables(batches, medians)


_SAME_MEDIAN = {
    "CLIP": ("CLIP_L", "CLIP_G", "CLIP_Flux"),
    "T5": ("T5", "T5_Flux"),
    "FluxSchnellFlowMatchEulerDiscreteScheduler": ("FluxFlowMatchEulerDiscreteScheduler",),
}


def setting_of(content: Mapping[str, Any], name: str) -> Setting:
    """A setting from a file's content; see docs/simulate.md. Raises InvalidInput."""
    try:
        weights = {each: float(weight) for each, weight in content.get("families", {}).items()}
        pipelines: dict[str, dict[str, Pipeline]] = {
            each: published_family(each) for each in weights if each in _FAMILIES
        }
        for entry in content.get("workflows", ()):
            fields = dict(entry)
            label = str(fields.pop("label", "A"))
            for key in ("encoders", "controls"):
                fields[key] = tuple(fields.get(key, ()))
            pipeline = Pipeline(**fields)
            pipelines.setdefault(pipeline.family, {})[label] = pipeline
            weights.setdefault(pipeline.family, 1.0)
        gpus = int(content["gpus"])
        numbers = {
            field: float(content[key])
            for key, field in _NUMBERS.items()
            if content.get(key) is not None
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(f"setting {name}: {type(error).__name__}: {error}") from error
    missing = [each for each in weights if each not in pipelines]
    if missing or not pipelines or gpus < 1:
        what = f"family '{missing[0]}' has no workflows" if missing else "no workflows, or no GPUs"
        raise InvalidInput(f"setting {name}: {what}; give families of {', '.join(_FAMILIES)}")
    per_host = int(content.get("gpusPerHost", 8))
    setting = Setting(name, gpus, Families(pipelines, weights), per_host)
    return replace(setting, **numbers)


_NUMBERS = {
    "nodeBytes": "node_bytes",
    "activationBytes": "activation_bytes",
    "monolithBytes": "monolith_bytes",
    "sloScale": "slo_scale",
}
