# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The study's order: choices frozen before the test, nothing done twice, within its CPU budget."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_student import SIDE, RandomSource, student_of, tiny_transformer

from shiva_kernels.errors import ShivaError
from shiva_kernels.estimators import Estimator
from shiva_kernels.training.config import Ratios, TrainConfig, read_yaml
from shiva_kernels.training.evaluation import fixed_samples, fixed_schedule, velocity_errors
from shiva_kernels.training.runs import CpuBudget, OutOfTime, Place, Runs
from shiva_kernels.training.study import TEST, VALIDATION, Scale, Study, full_arms, screen_arms

SMALL = Scale(
    screen_steps=1,
    arm_steps=(1, 1, 1),
    micro_batches=2,
    micro_batch=1,
    samples=8,
    validation_samples=8,
    router_rates=(1e-3, 3e-3),
    seeds=2,
)


class TinyRuns(Runs):
    """Runs on a tiny random transformer; counts how often a model is loaded to be trained."""

    @property
    def training_source(self) -> Any:
        return RandomSource()

    @property
    def held_out_source(self) -> Any:
        source: Any = RandomSource()
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5)
        source.captions = SimpleNamespace(pipeline=SimpleNamespace(scheduler=scheduler))
        return source


class TinyPlace(Place):
    def load(self) -> Any:
        return SimpleNamespace(
            transformer=tiny_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5)
        )


def study_in(folder: Path, hours: float = 1.0, clock: Any = None) -> Study:
    place = TinyPlace(folder / "runs", folder, None, folder, pixels=8 * SIDE)
    budget = CpuBudget(folder / "runs" / "cpu.json", hours, clock or (lambda: 0.0))
    return Study(TinyRuns(place, budget, lambda line: None), folder / "results", SMALL)


def test_the_screen_compares_every_arm_on_the_same_samples(tmp_path: Path) -> None:
    report = study_in(tmp_path).screen()
    arms = {estimator.value for estimator in Estimator} | {"random", "teacher-norm"}
    assert report["arms"].keys() == arms
    assert report["against_random"].keys() == arms - {"random"}
    assert report["winner"] in {estimator.value for estimator in Estimator}
    trials = {name: len(rates) for name, rates in report["validation"].items()}
    assert all(trials[e.value] == 2 for e in Estimator)
    assert (tmp_path / "results" / "screen.json").is_file()


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = study_in(tmp_path).screen()
    monkeypatch.setattr(TinyRuns, "student", lambda *a: pytest.fail("trained again"))
    second = study_in(tmp_path).screen()
    assert second["arms"] == first["arms"]


def test_the_frozen_choice_decides_the_arms(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    choice = '{"winner": "mod", "rates": {"mod": 0.007}, "validation": {}}'
    (results / "screen_choice.json").write_text(choice)
    arms = study_in(tmp_path).arms()
    assert arms["shiva"].arm.estimator is Estimator.MOD
    assert arms["shiva"].rates.router == arms["fixed"].rates.router == 0.007


def test_all_arms_have_the_same_samples_and_steps() -> None:
    arms = full_arms(SMALL, Estimator.BENEFIT, 1e-3)
    assert len({(a.steps, a.micro_batches, a.micro_batch, a.seed) for a in arms.values()}) == 1
    assert arms["shiva"].arm.ratios is Ratios.POLICY
    assert len({config.key() for config in arms.values()}) == 5
    assert len({c.key() for c in screen_arms(SMALL).values()}) == 8


def test_arms_are_averaged_over_seeds_and_paired(tmp_path: Path) -> None:
    report = study_in(tmp_path).train_arms()
    assert report["arms"].keys() == {"dense", "shiva", "fixed", "random", "diffcr"}
    for name, row in report["arms"].items():
        assert len(row["to_dense_by_seed"]) == (1 if name == "diffcr" else 2)
        assert row["to_dense"] == pytest.approx(np.mean(row["to_dense_by_seed"]))
    primary = report["primary_shiva_minus_fixed"]
    difference = report["arms"]["shiva"]["to_dense"] - report["arms"]["fixed"]["to_dense"]
    assert primary["mean"] == pytest.approx(difference, abs=1e-6)
    assert primary["low"] <= primary["mean"] <= primary["high"]


def test_the_cpu_budget_stops_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    seconds = iter(range(0, 10**6, 100))
    with pytest.raises(OutOfTime, match="cpu-hours"):
        study_in(tmp_path, 0.5, lambda: float(next(seconds))).screen()
    spent = CpuBudget(tmp_path / "runs" / "cpu.json", 1.0, lambda: 0.0).spent
    assert spent >= 1800
    assert study_in(tmp_path, 1000.0).screen()["winner"]


def test_validation_and_test_share_no_sample(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    seeds = [{sample.seed for sample in study.samples(split)} for split in (VALIDATION, TEST)]
    assert not seeds[0] & seeds[1]


def test_fixed_samples_are_the_same_for_every_arm() -> None:
    one, two = (list(fixed_samples(RandomSource(), 16, 1.5, size=4, seed=3)) for _ in range(2))
    assert [s.sigma for s in one] == [s.sigma for s in two]
    assert len({s.sigma for s in one}) == 4
    assert all((a.mixed == b.mixed).all() for a, b in zip(one, two, strict=True))


def test_pruning_less_errs_less() -> None:
    student = student_of(TrainConfig(router_width=8, rank=2))
    samples = list(fixed_samples(RandomSource(), 16, 1.5))
    errors = [
        velocity_errors(student, samples, fixed_schedule(ratio, 3)).to_dense.mean()
        for ratio in (0.25, 0.75, 1.0)
    ]
    assert errors[0] > errors[1] > errors[2] == 0
    assert velocity_errors(student, samples, None).to_dense.max() == 0


def test_an_unknown_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scale.yaml").write_text("prompts: 3\nsampels: 4\n")
    with pytest.raises(ShivaError, match="sampels"):
        read_yaml(Scale, tmp_path / "scale.yaml")
    (tmp_path / "scale.yaml").write_text("router_rates: [0.1]\n")
    assert read_yaml(Scale, tmp_path / "scale.yaml").router_rates == (0.1,)
