# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Measurements of live nodes as the files that `costs_of` and `setting_of` read.

Of a denoiser a forward at batch b is a step of b/branches requests together, as the artifact's
profiles count it. What `execution` cannot say, the amount of work that a stage was measured at, is
in `stages`, from which a gateway can start its running estimates.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.pipelines import DECODE, Pipeline

_MODES = {"decode": DECODE, "encode_image": "encode_image"}


@dataclass(frozen=True, slots=True)
class Forward:
    """The median of `samples` runs of one stage: a call, or a step of a denoiser, in seconds.

    ``units`` is the amount of work as the gateway counts it: pixels for what grows with the
    picture, else 1.
    """

    model: str
    stage: str
    fingerprint: str
    size: str  # WIDTHxHEIGHT
    batch: int
    seconds: float
    units: float
    samples: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model became ready within `seconds`, from its files."""

    role: str
    model: str
    seconds: float
    nbytes: int
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the simulator must know of a workflow beside its models' costs."""

    name: str
    family: str
    encoders: Sequence[str]
    denoiser: str
    decoder: str
    controls: Sequence[str]
    steps: int
    branches: int


def model_profiles(
    loads: Iterable[Loaded], forwards: Sequence[Forward], *, device: str, version: str
) -> dict[str, Any]:
    """The content of `model_profiles.json`. The first size measured is a model's own mode; of
    others the size is part of the mode's name."""
    first = forwards[0].size if forwards else ""
    models: dict[str, Any] = {}
    for load in loads:
        own = [each for each in forwards if each.model == load.model]
        models[load.model] = {
            "role": load.role,
            "digest": load.digest,
            "fingerprints": sorted({each.fingerprint for each in own}),
            "load": {"host_to_gpu_s": load.seconds, "gpu_bytes": load.nbytes},
            "execution": [
                {
                    "mode": _mode(each, first),
                    "batch": each.batch,
                    "seconds": each.seconds,
                    "samples": each.samples,
                }
                for each in own
            ],
        }
    return {
        "source": f"kubediffusion {version} profile: live nodes, the whole way, medians",
        "device": device,
        "models": models,
        "stages": [
            {
                "model": each.model,
                "stage": each.stage,
                "fingerprint": each.fingerprint,
                "units": each.units,
                "seconds": each.seconds,
            }
            for each in forwards
            if each.units
        ],
    }


def transfer_profiles(
    same_host: Mapping[int, float], cross_host: Mapping[int, float]
) -> dict[str, Any]:
    """The content of `transfer_profiles.json`, from seconds by bytes."""
    return {
        "columns": ["bytes", "microseconds"],
        "same_host": [[nbytes, seconds * 1e6] for nbytes, seconds in sorted(same_host.items())],
        "cross_host": [[nbytes, seconds * 1e6] for nbytes, seconds in sorted(cross_host.items())],
    }


def setting_content(shape: Shape, gpus: int, node_bytes: float) -> dict[str, Any]:
    """The content of a setting's file: text to image, and with each ControlNet by itself."""
    workflows = [_workflow(shape, "A", ())]
    for label, control in zip("BCDEFGH", shape.controls, strict=False):
        workflows.append(_workflow(shape, label, (control,)))
    return {
        "gpus": gpus,
        "gpusPerHost": gpus,
        "families": {shape.family: 1},
        "workflows": workflows,
        "nodeBytes": node_bytes,
        "activationBytes": 0,
    }


def trace_text(pipelines: Sequence[Pipeline], costs: Costs, count: int = 200) -> str:
    """Poisson arrivals of the workflows by their labels A, B, ..., as `parse_trace` reads them: at
    rate 1 they are as much work as one node could just do. The same costs, the same trace."""
    draw = random.Random(0)
    mean = sum(each.solo_seconds(costs) for each in pipelines) / len(pipelines)
    lines = [f"# requests of {', '.join(each.name for each in pipelines)}; {mean:.4g} s apart"]
    for _ in range(count):
        label = draw.choice(pipelines).name.rpartition("/")[2]
        lines.append(f"{label} {draw.expovariate(1 / mean):.6f}")
    return "\n".join(lines)


def _workflow(shape: Shape, label: str, controls: Sequence[str]) -> dict[str, Any]:
    return {
        "name": f"{shape.name}/{label}",
        "label": label,
        "family": shape.family,
        "encoders": list(shape.encoders),
        "denoiser": shape.denoiser,
        "controls": list(controls),
        "decoder": shape.decoder,
        "steps": shape.steps,
        "prompts": shape.branches,
        "branches": shape.branches,
    }


def _mode(forward: Forward, first: str) -> str:
    mode = _MODES.get(forward.stage, "default")
    return mode if forward.size == first else f"{mode}@{forward.size}"
