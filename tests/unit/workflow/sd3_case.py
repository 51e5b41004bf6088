# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""An SD3 workflow as the tests here use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kubediffusion.api import load_workflow
from kubediffusion.workflow import PipelineIndex, ResolvedWorkflow, Task, bind, expand, resolve

INDEX = PipelineIndex(
    {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "tokenizer": "CLIPTokenizer",
    },
    "0123abcd",
)
FACTS: Mapping[str, Mapping[str, str | int | float | bool]] = {
    "vae": {"vae_scale_factor": 8, "latent_channels": 16},
    "transformer": {"patch_size": 2, "sample_size": 16, "pos_embed_max_size": 12},
    "controlnet.a": {"force_zeros_for_pooled_projection": True},
    "controlnet.b": {"force_zeros_for_pooled_projection": False},
    "controlnet.c": {"force_zeros_for_pooled_projection": False},
}
HEAD = """
apiVersion: kubediffusion.io/v1alpha1
kind: DiffusionWorkflow
metadata: {name: w}
spec:
  pipeline: {preset: StableDiffusion3, source: {uri: "hf://org/name"}}
"""
LORAS = """
  loras:
    - {name: ink, source: {uri: "hf://org/ink", revision: r1}, weightName: ink.safetensors}
    - {name: wash, source: {uri: "hf://org/wash"}, scale: "0.5"}
"""


def controls(names: Sequence[str]) -> str:
    nets = "".join(f"\n    - {{name: {n}, source: {{uri: 'hf://org/{n}'}}}}" for n in names)
    return f"\n  controlNets:{nets}\n" if names else ""


def resolved(extra: str = "", head: str = HEAD, index: PipelineIndex = INDEX) -> ResolvedWorkflow:
    return resolve(load_workflow(head + extra), index)


def without(*roles: str) -> PipelineIndex:
    kept = {name: value for name, value in INDEX.components.items() if name not in roles}
    return PipelineIndex(kept, INDEX.commit)


def tasks(
    workflow: ResolvedWorkflow,
    inputs: Mapping[str, object] | None = None,
    loras: Mapping[str, float] | None = None,
) -> dict[str, Task]:
    """The tasks of a request, by name, in their order."""
    bound = bind(workflow, {"prompt": "a cat", "seed": 7, **(inputs or {})}, loras, FACTS)
    return {task.name: task for task in expand(workflow, bound, FACTS)}
