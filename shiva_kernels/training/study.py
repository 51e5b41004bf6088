# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The study: which estimator, which arm, what it costs in pictures, at which budget.

    A  screen     router only, ratio 0.6: velocity error to dense of the estimators and of scores
                  that need no training
    B  arms       trained whole: dense, Shiva, fixed ratio, random scores; three seeds each; and
                  DiffCR's manner of learning ratios (`bins`), one seed
    C  pictures   two-object prompts of held-out combinations, several seeds, the same noise;
                  untrained merging beside the arms
    D  budgets    the other tables of the shipped artifact

All arms see the same samples. Samples at one noise level are one cluster of the bootstrap, as are
pictures of one prompt. Tuning is on validation prompts, at most three trials an arm; the
choice is written down and frozen before a test sample is drawn. Primary endpoint: Shiva against
fixed ratio, velocity error to dense at 0.6.

Flat shapes on a flat ground are the easiest case for pruning: most tokens show nothing. What wins
here says which arm learns, and nothing about SD3 on photographs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shiva_kernels.estimators import Estimator
from shiva_kernels.tables import build_table
from shiva_kernels.training.assemble import curve_of, image_tokens
from shiva_kernels.training.bins import BinnedRatios
from shiva_kernels.training.config import (
    Arm,
    Rates,
    Ratios,
    Scores,
    Settings,
    Steps,
    TrainConfig,
    Weights,
)
from shiva_kernels.training.evaluation import (
    Case,
    Sample,
    Sampling,
    Schedule,
    dense_answers,
    draw,
    fixed_samples,
    fixed_schedule,
    picture_features,
    right,
    shape_cases,
    sigma_grid,
    table_schedule,
    velocity_errors,
)
from shiva_kernels.training.merging import merged
from shiva_kernels.training.runs import Arrays, Runs, chosen_once, write_json
from shiva_kernels.training.statistics import kernel_distance, paired_difference
from shiva_kernels.training.student import Observation, Student

RATIO = 0.6
DIFFCR = "diffcr"
VALIDATION, TEST = 1, 2  # seeds of sample sets; streams of prompts follow from them
_UNTRAINED = Steps(router=0, policy=0, joint=0)


class Scale(Settings):
    """How large the study is. The defaults are meant for six CPU hours."""

    screen_steps: int = 80
    arm_steps: tuple[int, int, int] = (60, 40, 120)
    micro_batches: int = 4
    micro_batch: int = 4
    samples: int = 512
    validation_samples: int = 128
    router_rates: tuple[float, ...] = (3e-3, 1e-2)
    seeds: int = 3
    prompts: int = 300
    picture_seeds: int = 3
    steps: int = 14

    @property
    def common(self) -> dict[str, Any]:
        """What all configs share."""
        return {
            "micro_batches": self.micro_batches,
            "micro_batch": self.micro_batch,
            "warmup": 10,
            "rank": 8,
            "target": RATIO,
        }


def screen_arms(scale: Scale) -> dict[str, TrainConfig]:
    """Study A before tuning: the estimators, and two kinds of scores without a router."""
    steps = Steps(router=scale.screen_steps, policy=0, joint=0)
    arms = {
        estimator.value: TrainConfig(
            arm=Arm(ratios=Ratios.FIXED, estimator=estimator), steps=steps, **scale.common
        )
        for estimator in Estimator
    }
    for scores in (Scores.RANDOM, Scores.TEACHER_NORM):
        arm = Arm(scores=scores, ratios=Ratios.FIXED, estimator=None)
        arms[scores.value] = TrainConfig(arm=arm, steps=_UNTRAINED, **scale.common)
    return arms


def full_arms(scale: Scale, estimator: Estimator, router_rate: float) -> dict[str, TrainConfig]:
    """Study B: the arms of equal FLOPs, and dense fine-tuning with the same samples."""
    router, policy, joint = scale.arm_steps
    steps = Steps(router=router, policy=policy, joint=joint)
    common = scale.common | {
        "steps": steps,
        "rates": Rates(router=router_rate, policy=1e-3, adapter=1e-3),
        "decay": 0.5,
    }
    only_data = Weights(budget=0, distillation=0, output=0)
    # A ratio cannot be learnt without a gradient in k: then that arm has the fixed ratio alone.
    ratios = Ratios.FIXED if estimator is Estimator.STRAIGHT_THROUGH else Ratios.POLICY
    random = Arm(scores=Scores.RANDOM, ratios=Ratios.FIXED, estimator=None)
    return {
        "dense": TrainConfig(
            arm=Arm(ratios=Ratios.DENSE, estimator=None), weights=only_data, **common
        ),
        "shiva": TrainConfig(arm=Arm(ratios=ratios, estimator=estimator), **common),
        "fixed": TrainConfig(arm=Arm(ratios=Ratios.FIXED, estimator=estimator), **common),
        "random": TrainConfig(arm=random, **common),
        DIFFCR: TrainConfig(
            arm=Arm(ratios=Ratios.BINS, estimator=Estimator.MOD),
            weights=Weights(budget=0.3),
            **common,
        ),
    }


class Study:
    """Does what is not done yet, and writes tables of what is, to `results`."""

    def __init__(self, runs: Runs, results: Path, scale: Scale | None = None) -> None:
        self.runs, self.results, self.scale = runs, results, scale or Scale()
        self._samples: dict[int, list[Sample]] = {}
        self._dense: dict[int, list[Observation]] = {}

    @cached_property
    def _scheduler(self) -> Any:
        return self.runs.held_out_source.captions.pipeline.scheduler

    # ------------------------------------------------------------ velocity

    def samples(self, split: int) -> list[Sample]:
        """The fixed samples of validation or test."""
        if split not in self._samples:
            count, shift = self._count(split), self._scheduler.config.shift
            drawn = fixed_samples(self.runs.held_out_source, count, shift, seed=split)
            self._samples[split] = list(drawn)
        return self._samples[split]

    def _count(self, split: int) -> int:
        return self.scale.samples if split == TEST else self.scale.validation_samples

    def _answers(self, student: Student, split: int) -> list[Observation]:
        """The dense backbone's, computed once for all arms but those that look into its blocks."""
        if student.needs_deltas:
            return dense_answers(student, self.samples(split))
        if split not in self._dense:
            self._dense[split] = dense_answers(student, self.samples(split))
        return self._dense[split]

    def schedule(self, student: Student, budget: float) -> Schedule | None:
        """The arm's keep ratios at a budget."""
        arm = student.config.arm
        if not arm.prunes:
            return None
        if arm.ratios is Ratios.FIXED:
            return fixed_schedule(budget, student.prunable)
        tokens = image_tokens(student.transformer, self.runs.place.pixels)
        grid = sigma_grid(self._scheduler, self.scale.steps)
        if isinstance(student.policy, BinnedRatios):
            return table_schedule(student.policy.table(budget, grid, tokens))
        return table_schedule(build_table(curve_of(student), budget, grid, tokens))

    def velocity(self, name: str, config: TrainConfig, split: int, budget: float = RATIO) -> Arrays:
        """Errors of an arm on a sample set, cached."""

        def measure(student: Student) -> Arrays:
            schedule, answers = self.schedule(student, budget), self._answers(student, split)
            errors = velocity_errors(student, self.samples(split), schedule, answers)
            return {
                "to_dense": errors.to_dense,
                "to_data": errors.to_data,
                "sigmas": errors.sigmas,
            }

        what = f"velocity-{split}-{self._count(split)}-{budget:g}"
        return self.runs.cached(name, config, what, measure)

    # ------------------------------------------------------------ A

    def screen(self) -> dict[str, Any]:
        """Study A: `screen.json`."""
        arms = screen_arms(self.scale)
        choice = chosen_once(self.results / "screen_choice.json", lambda: self._tune(arms))
        errors: dict[str, NDArray[np.float64]] = {}
        times: Sequence[float] = ()
        for name, config in arms.items():
            tuned = _with_rate(config, choice["rates"].get(name))
            measured = self.velocity(name, tuned, TEST)
            errors[name], times = measured["to_dense"], measured["sigmas"].tolist()
        report = {
            "what": "study A: router only, ratio 0.6, velocity error to dense",
            "samples": self.scale.samples,
            "steps": self.scale.screen_steps,
            "samples_a_step": self.scale.micro_batches * self.scale.micro_batch,
            "arms": {name: {"mse": float(values.mean())} for name, values in errors.items()},
            "against_random": _against(errors, "random", times),
            "against_residual": _against(errors, Estimator.RESIDUAL.value, times),
            "winner": choice["winner"],
            "validation": choice["validation"],
            "cpu_hours_so_far": round(self.runs.budget.spent / 3600, 2),
        }
        write_json(self.results / "screen.json", report)
        return report

    def _tune(self, arms: Mapping[str, TrainConfig]) -> dict[str, Any]:
        """On validation prompts: a rate for each router, and the winner."""
        validation: dict[str, dict[str, float]] = {}
        for name, config in arms.items():
            rates = self.scale.router_rates if config.arm.learns_scores else (None,)
            validation[name] = {
                str(rate): float(
                    self.velocity(name, _with_rate(config, rate), VALIDATION)["to_dense"].mean()
                )
                for rate in rates
            }
        learnt = {name for name, config in arms.items() if config.arm.learns_scores}
        best = {
            name: min(trials, key=lambda rate: trials[rate]) for name, trials in validation.items()
        }
        winner = min(learnt, key=lambda name: validation[name][best[name]])
        return {
            "winner": winner,
            "rates": {name: float(best[name]) for name in sorted(learnt)},
            "validation": validation,
        }

    # ------------------------------------------------------------ B

    def arms(self) -> dict[str, TrainConfig]:
        """Study B's configs, by the frozen choice of A."""
        choice = chosen_once(
            self.results / "screen_choice.json", lambda: self._tune(screen_arms(self.scale))
        )
        winner = choice["winner"]
        return full_arms(self.scale, Estimator(winner), choice["rates"][winner])

    def train_arms(self) -> dict[str, Any]:
        """Study B: `arms.json`. A sample's error is its mean over the training seeds."""
        errors: dict[str, list[Arrays]] = {}
        for seed in range(self.scale.seeds):  # a whole round of arms, then the next seed
            for name, config in self.arms().items():
                if seed and name == DIFFCR:
                    continue  # its steps cost twice
                seeded = config.model_copy(update={"seed": seed})
                errors.setdefault(name, []).append(self.velocity(name, seeded, TEST))
        means = {n: np.mean([e["to_dense"] for e in es], axis=0) for n, es in errors.items()}
        data = {n: np.mean([e["to_data"] for e in es], axis=0) for n, es in errors.items()}
        times: Sequence[float] = errors["shiva"][0]["sigmas"].tolist()
        report = {
            "what": "study B: trained arms at 0.6, velocity errors, mean over training seeds",
            "samples": self.scale.samples,
            "steps": dict(zip(("router", "policy", "joint"), self.scale.arm_steps, strict=True)),
            "training_seeds": self.scale.seeds,
            "arms": {
                name: {
                    "to_dense": float(means[name].mean()),
                    "to_data": float(data[name].mean()),
                    "to_dense_by_seed": [float(e["to_dense"].mean()) for e in errors[name]],
                }
                for name in errors
            },
            "primary_shiva_minus_fixed": paired_difference(
                means["shiva"], means["fixed"], times
            ).as_dict(),
            "to_data_against_dense": _against(data, "dense", times),
            "cpu_hours_so_far": round(self.runs.budget.spent / 3600, 2),
        }
        write_json(self.results / "arms.json", report)
        return report

    # ------------------------------------------------------------ C

    def pictures(self) -> dict[str, Any]:
        """Study C: `pictures.json`, of the arms' first training seed and of untrained merging."""
        cases = self.cases(TEST)
        arms: dict[str, tuple[TrainConfig, str]] = {n: (c, "arm") for n, c in self.arms().items()}
        plain = TrainConfig(arm=Arm(ratios=Ratios.DENSE, estimator=None), steps=_UNTRAINED)
        arms |= {"untrained": (plain, "arm"), "merging": (plain, "merge")}
        drawn = {
            name: self._drawn(name, config, how, cases) for name, (config, how) in arms.items()
        }
        clusters = [case.cluster for case in cases]
        correct = {name: arrays["right"] for name, arrays in drawn.items()}
        report = {
            "what": "study C: two-object prompts of held-out combinations, everything right",
            "prompts": self.scale.prompts,
            "seeds": self.scale.picture_seeds,
            "sampler_steps": self.scale.steps,
            "arms": {
                name: {
                    "right": float(correct[name].mean()),
                    "kid_to_dense": kernel_distance(arrays["features"], drawn["dense"]["features"]),
                }
                for name, arrays in drawn.items()
            },
            "right_against_dense": _against(correct, "dense", clusters),
            "right_against_shiva": _against(correct, "shiva", clusters),
            "cpu_hours_so_far": round(self.runs.budget.spent / 3600, 2),
        }
        write_json(self.results / "pictures.json", report)
        return report

    def cases(self, split: int) -> list[Case]:
        """Prompts of a split, the seeds of one prompt side by side."""
        scale = self.scale
        return shape_cases(
            self.runs.place.trainer, scale.prompts, scale.picture_seeds, stream=20_000 + split
        )

    def _drawn(
        self, name: str, config: TrainConfig, how: str, cases: Sequence[Case], budget: float = RATIO
    ) -> Arrays:
        pipeline = self.runs.held_out_source.captions.pipeline
        sampling = Sampling(steps=self.scale.steps, pixels=self.runs.place.pixels)

        def paint(student: Student) -> Arrays:
            asked = ([case.prompt for case in cases], [case.seed for case in cases])
            if how == "merge":
                with merged(student.transformer, budget):
                    pictures = draw(student, pipeline, *asked, sampling, None)
            else:
                schedule = self.schedule(student, budget)
                pictures = draw(student, pipeline, *asked, sampling, schedule)
            correct = right(self.runs.place.trainer, cases, pictures)
            sheet = pictures[: 16 * self.scale.picture_seeds : self.scale.picture_seeds]
            return {
                "right": correct,
                "features": picture_features(pipeline, pictures),
                "sheet": sheet,
            }

        what = f"pictures-{how}-{self.scale.prompts}x{self.scale.picture_seeds}"
        return self.runs.cached(name, config, f"{what}-{self.scale.steps}-{budget:g}", paint)

    # ------------------------------------------------------------ D

    def budgets(self, budgets: Sequence[float] = (0.8, 0.6, 0.4)) -> dict[str, Any]:
        """Study D: the one Shiva arm at every shipped budget, by table alone: `budgets.json`."""
        config, cases = self.arms()["shiva"], self.cases(TEST)
        clusters = [case.cluster for case in cases]
        dense = self._drawn("dense", self.arms()["dense"], "arm", cases)["right"]
        rows: dict[str, Any] = {}
        for budget in budgets:
            errors = self.velocity("shiva", config, TEST, budget)
            correct = self._drawn("shiva", config, "arm", cases, budget)["right"]
            rows[f"{budget:g}"] = {
                "to_dense": float(errors["to_dense"].mean()),
                "right": float(correct.mean()),
                "right_minus_dense": paired_difference(correct, dense, clusters).as_dict(),
            }
        report = {"what": "study D: one artifact, three tables", "budgets": rows}
        write_json(self.results / "budgets.json", report)
        return report


def _with_rate(config: TrainConfig, rate: float | None) -> TrainConfig:
    if rate is None:
        return config
    return config.model_copy(update={"rates": config.rates.model_copy(update={"router": rate})})


def _against(
    values: Mapping[str, NDArray[np.float64]], reference: str, clusters: Sequence[float]
) -> dict[str, Any]:
    return {
        name: paired_difference(mine, values[reference], clusters).as_dict()
        for name, mine in values.items()
        if name != reference
    }
