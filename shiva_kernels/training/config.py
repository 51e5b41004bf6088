# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a training run is: its arm, its stages, its rates. A run is known by its config's key."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shiva_kernels.errors import ShivaError
from shiva_kernels.estimators import Estimator

Share = Annotated[float, Field(gt=0, le=1)]
Read = TypeVar("Read", bound=BaseModel)


class Stage(StrEnum):
    """What is trained. The names are the order (section 4.3 of arXiv 2602.05605)."""

    ROUTER = "router"  # ratios drawn by strata; the policy does not speak
    POLICY = "policy"  # the policy's ratios with noise on its logits, and the budget's loss
    JOINT = "joint"  # no noise; the backbone's DoRA learns too


class Scores(StrEnum):
    """What ranks the tokens."""

    ROUTER = "router"
    RANDOM = "random"
    TEACHER_NORM = "teacher-norm"  # how much the dense teacher's block changes a token: an oracle


class Ratios(StrEnum):
    """What says how many tokens a block keeps."""

    POLICY = "policy"
    FIXED = "fixed"  # the target in every block at every time
    DENSE = "dense"  # all of them: fine-tuning without pruning
    BINS = "bins"  # a number for each block and noise region, two forwards a block: as DiffCR

    @property
    def learn(self) -> bool:
        """Whether they do."""
        return self in (Ratios.POLICY, Ratios.BINS)


class Settings(BaseModel):
    """Cannot be changed, and knows no other field."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Arm(Settings):
    """One thing to compare."""

    scores: Scores = Scores.ROUTER
    ratios: Ratios = Ratios.POLICY
    estimator: Estimator | None = Estimator.RESIDUAL

    @property
    def prunes(self) -> bool:
        """Whether blocks get fewer tokens at all."""
        return self.ratios is not Ratios.DENSE

    @property
    def learns_scores(self) -> bool:
        """Whether there is a router to train."""
        return self.prunes and self.scores is Scores.ROUTER and self.estimator is not None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        no_router = self.scores is not Scores.ROUTER
        if self.ratios.learn and (no_router or self.estimator is None):
            raise ValueError("a ratio policy learns through the router's estimator: give it both")
        if self.ratios is Ratios.POLICY and self.estimator is Estimator.STRAIGHT_THROUGH:
            raise ValueError("the straight-through estimator has no gradient in k: no policy")
        return self


class Steps(Settings):
    """Optimiser steps of each stage; 0 leaves a stage out."""

    router: int = Field(default=2000, ge=0)
    policy: int = Field(default=3000, ge=0)
    joint: int = Field(default=10000, ge=0)

    @property
    def total(self) -> int:
        return self.router + self.policy + self.joint

    def at(self, step: int) -> tuple[Stage, int, int]:
        """The stage of an optimiser step, the step within it, and the stage's length."""
        for stage, length in self.by_stage().items():
            if step < length:
                return stage, step, length
            step -= length
        raise IndexError(f"step {step} is past the end of the training")

    def by_stage(self) -> dict[Stage, int]:
        return {Stage.ROUTER: self.router, Stage.POLICY: self.policy, Stage.JOINT: self.joint}


class Annealed(Settings):
    """A temperature that falls from `start` to `end` in half a cosine over the whole training."""

    start: float = Field(gt=0)
    end: float = Field(gt=0)


class Weights(Settings):
    """Of the losses: the budget (lambda lambda_b) and the distillation (lambda_d)."""

    budget: float = Field(default=2.0, ge=0)
    distillation: float = Field(default=1.0, ge=0)
    output: float = Field(default=1.0, ge=0)  # distance to the teacher's velocity


class Rates(Settings):
    """Learning rates of AdamW."""

    router: float = Field(default=3e-4, gt=0)
    policy: float = Field(default=1e-4, gt=0)
    adapter: float = Field(default=1e-4, gt=0)


class TrainConfig(Settings):
    """A whole run; two runs of one key draw the same data, times and noise.

    micro_batches: of one timestep each, over all processes, a stratum each; they make a step.
    micro_batch: samples of one.
    score_noise: deviation added to the standardised scores; top-k and soft rank see the same.
    ratio_range: of the router's warm-up.
    distill_every: blocks between two that are compared with the teacher.
    """

    arm: Arm = Arm()
    target: Share = 0.6
    steps: Steps = Steps()
    micro_batches: int = Field(default=16, ge=1)
    micro_batch: int = Field(default=1, ge=1)
    rates: Rates = Rates()
    weights: Weights = Weights()
    warmup: int = Field(default=200, ge=0)
    decay: float = Field(default=0.0, ge=0, le=1)  # share of each stage with a falling rate
    tau_rank: Annealed = Annealed(start=0.2, end=0.05)
    tau_sel: Annealed = Annealed(start=0.1, end=0.02)
    score_noise: float = Field(default=0.1, ge=0)
    logit_noise: float = Field(default=1.0, ge=0)
    ratio_range: tuple[Share, Share] = (0.3, 1.0)
    router_in_policy: bool = True
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    distill_every: int = Field(default=4, ge=1)
    router_width: int = Field(default=64, ge=1)
    router_sharing: int = Field(default=2, ge=1)
    rank: int = Field(default=32, ge=1)
    clip: float = Field(default=1.0, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.ratio_range[0] > self.ratio_range[1]:
            raise ValueError("ratio_range goes from the lower ratio to the higher")
        if self.steps.total == 0 and self.arm.learns_scores:
            raise ValueError("an arm with a router needs steps to train it")
        return self

    def key(self) -> str:
        """A short name that changes whenever anything of the config does."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]


def load_config(path: Path) -> TrainConfig:
    """Read a training's YAML file; what it leaves out has its default. Raises ShivaError."""
    return read_yaml(TrainConfig, path)


def read_yaml(model: type[Read], path: Path) -> Read:
    """A model from a YAML file.

    Raises:
        ShivaError: no file, no YAML, or a field that does not exist or cannot have its value.
    """
    try:
        return model.model_validate(yaml.safe_load(path.read_text()) or {})
    except OSError as error:
        raise ShivaError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ShivaError(f"{path}: not YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the config"
        raise ShivaError(f"{path}: {where}: {first['msg']}") from error
