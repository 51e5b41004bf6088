# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Runs a workflow's tasks one after the other in this process, on the families' own code."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from PIL import Image

from benchmarks.reference import Case, Setup, inputs, workflow
from kubediffusion import api, models, sources
from kubediffusion import workflow as language
from kubediffusion.models.base import LoadSpec, Lora, Model
from kubediffusion.node import ports


class InProcess:
    """The pipeline of `setup`, loaded as a node would load it; `dtypes` by role, where others."""

    def __init__(self, setup: Setup, dtypes: Mapping[str, str] = MappingProxyType({})) -> None:
        text = yaml.safe_load(workflow(setup, "parity"))
        overrides = text["spec"].setdefault("models", {})
        for role, dtype in dtypes.items():
            overrides.setdefault(role, {})["dtype"] = dtype
        definition = api.load_workflow(yaml.safe_dump(text))
        source = definition.spec.pipeline.source
        self.resolved = language.resolve(definition, sources.read_index(source.uri))
        self.models: dict[str, Model] = {
            role: models.load(_load_spec(ref)) for role, ref in self.resolved.models.items()
        }

    @cached_property
    def facts(self) -> Mapping[str, Mapping[str, Any]]:
        return {role: model.facts for role, model in self.models.items()}

    def tasks(self, case: Case) -> tuple[language.Task, ...]:
        bound = language.bind(self.resolved, inputs(case), case.loras, self.facts)
        return language.expand(self.resolved, bound, self.facts)

    def prepare(self, case: Case) -> tuple[language.Task, dict[str, Any], dict[str, Any]]:
        """Everything before the denoising: its task, its inputs, and what `start` takes else."""
        made: dict[tuple[str, str], Any] = {}
        for task in self.tasks(case):
            given = {
                port: made[value.task, value.port]
                if isinstance(value, language.PortRef)
                else value.value
                for port, value in task.inputs.items()
            }
            loras = [_lora(use) for use in task.loras]
            if task.stage == "denoise":
                nets = [(n, self.models[f"controlnet.{n}"]) for n, _ in task.controlnets]
                return task, given, {"loras": loras, "controlnets": nets}
            outputs = self.models[task.role].run(task.stage, given, loras)
            made |= {(task.name, port): _wired(outputs[port]) for port in task.outputs}
        raise AssertionError("no denoise task")

    def start(self, case: Case) -> Any:
        _, given, rest = self.prepare(case)
        return self.denoiser.start(given, budget=self.budget(case), **rest)

    def budget(self, case: Case) -> float | None:
        return language.choose_budget(self.resolved, case.budget, self.facts["transformer"])

    @property
    def denoiser(self) -> Any:
        return self.models["transformer"]

    def decode(self, denoising: Any) -> bytes:
        image = self.models["vae"].run("decode", denoising.finish())["image"]
        out = io.BytesIO()
        Image.fromarray(image).save(out, "PNG")
        return out.getvalue()

    def draw(self, case: Case) -> bytes:
        denoising = self.start(case)
        while denoising.step < denoising.total_steps:
            self.denoiser.advance([denoising])
        return self.decode(denoising)


def _wired(value: Any) -> Any:
    """As it comes out of a message."""
    return ports.tensor(ports.inline("", value), {}) if isinstance(value, torch.Tensor) else value


def _load_spec(ref: language.ModelRef) -> LoadSpec:
    path = sources.open(ref.uri).path
    pruning = ref.options.get("pruning_uri")
    return LoadSpec(
        identity=ref.identity,
        family=ref.family,
        component=ref.component,
        path=path / ref.subfolder if ref.subfolder else path,
        pipeline_path=path,
        dtype=ref.dtype,
        variant=ref.variant,
        class_name=ref.class_name,
        options=ref.options,
        pruning_path=sources.open(pruning).path if pruning else None,
    )


def _lora(use: language.LoraUse) -> Lora:
    return Lora(use.name, Path(sources.open(use.uri).path), use.scale, use.weight_name)
