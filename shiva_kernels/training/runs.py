# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Runs of the study: each cached in a folder named by its config's key, within one CPU budget."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from numpy.typing import NDArray

from shiva_kernels.errors import ShivaError
from shiva_kernels.training.assemble import load_pipeline, make_student
from shiva_kernels.training.config import TrainConfig
from shiva_kernels.training.data import ShapesSource
from shiva_kernels.training.student import Student
from shiva_kernels.training.trainer import Trainer

Arrays = dict[str, NDArray[Any]]


class OutOfTime(ShivaError):
    """The CPU budget is used up. What is done is kept: the same command goes on."""


@dataclass(frozen=True)
class Place:
    """Where a study finds its model and keeps its runs."""

    runs: Path
    pipeline: Path
    transformer: Path | None
    trainer: Path
    pixels: int = 256

    def load(self) -> StableDiffusion3Pipeline:
        """A fresh pipeline: a student puts hooks and an adapter on its transformer."""
        return load_pipeline(self.pipeline, self.transformer)


@dataclass
class CpuBudget:
    """CPU seconds of this process, over all starts of the study; the file remembers."""

    path: Path
    hours: float
    clock: Callable[[], float] = time.process_time
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self.clock()

    @property
    def spent(self) -> float:
        """Seconds, earlier starts included."""
        kept = json.loads(self.path.read_text())["seconds"] if self.path.exists() else 0.0
        return kept + self.clock() - self._since

    def note(self) -> None:
        """Write down what was spent so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        total = self.spent
        self._since = self.clock()
        self.path.write_text(json.dumps({"seconds": round(total, 1)}) + "\n")

    def check(self, what: str) -> None:
        """Raises OutOfTime before work that would begin after the budget's end."""
        self.note()
        if self.spent > 3600 * self.hours:
            raise OutOfTime(
                f"{self.hours:g} CPU hours are used up before {what}; the same command with a "
                "larger --cpu-hours goes on from here"
            )


@dataclass
class Runs:
    """All runs of a study."""

    place: Place
    budget: CpuBudget
    say: Callable[[str], None] = print

    @cached_property
    def training_source(self) -> ShapesSource:
        """Scenes of the training side of the world's split."""
        return ShapesSource(self.place.trainer, self.place.load(), self.place.pixels)

    @cached_property
    def held_out_source(self) -> ShapesSource:
        """Two-object scenes whose combinations were never trained on."""
        place = self.place
        return ShapesSource(
            place.trainer, place.load(), place.pixels, held_out=True, pair_share=1.0
        )

    def folder(self, name: str, config: TrainConfig) -> Path:
        """Of one run; any change of the config is another folder."""
        return self.place.runs / f"{name}-s{config.seed}-{config.key()}"

    def student(self, name: str, config: TrainConfig) -> Student:
        """Trained to the end, from its checkpoint where there is one."""
        pipeline = self.place.load()
        student = make_student(pipeline, config, pixels=self.place.pixels)
        if not student.trainable():
            return student
        shift = pipeline.scheduler.config.shift
        folder = self.folder(name, config)
        trainer = Trainer(config, student, self.training_source, folder, shift=shift)
        total = config.steps.total
        # In parts, so that a long run stops within the budget too.
        while trainer.step < total:
            self.budget.check(f"step {trainer.step} of {folder.name}")
            self.say(f"{folder.name}: step {trainer.step} of {total}")
            trainer.run(until=trainer.step + 25)
        self.budget.note()
        return student

    def cached(
        self, name: str, config: TrainConfig, what: str, make: Callable[[Student], Arrays]
    ) -> Arrays:
        """Measured numbers of a trained run, computed once and kept beside it."""
        path = self.folder(name, config) / f"{what}.npz"
        if path.exists():
            with np.load(path) as kept:
                return {key: kept[key] for key in kept.files}
        self.budget.check(f"{what} of {path.parent.name}")
        student = self.student(name, config)
        self.say(f"{path.parent.name}: {what}")
        with torch.no_grad():
            arrays = make(student)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
        self.budget.note()
        return arrays


def write_json(path: Path, content: Any) -> None:
    """Pretty, with a newline at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def chosen_once(path: Path, make: Callable[[], Any]) -> Any:
    """A choice that is made once and then frozen in a file, before anything of the test is seen."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text())
