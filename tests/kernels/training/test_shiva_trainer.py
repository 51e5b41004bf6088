# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The training loop: what each stage changes, what every arm sees, restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_student import RandomSource, student_of

from shiva_kernels.errors import ShivaError
from shiva_kernels.estimators import Estimator
from shiva_kernels.training.config import Arm, Ratios, Scores, Steps, TrainConfig
from shiva_kernels.training.logs import CsvLog, read_log
from shiva_kernels.training.student import Student
from shiva_kernels.training.trainer import Trainer, annealed


def config_of(**changes: Any) -> TrainConfig:
    small: dict[str, Any] = {
        "steps": Steps(router=2, policy=2, joint=2),
        "micro_batches": 2,
        "micro_batch": 2,
        "warmup": 0,
        "rank": 2,
        "distill_every": 2,
        "router_width": 8,
    }
    return TrainConfig(**small | changes)


def trained(config: TrainConfig, folder: Path, until: int | None = None) -> Trainer:
    trainer = Trainer(config, student_of(config), RandomSource(), folder)
    trainer.run(until)
    return trainer


def snapshot(student: Student) -> dict[str, torch.Tensor]:
    parts = {"router": student.router.state_dict(), "policy": student.policy.state_dict()}
    flat = {f"{part}.{k}": v.clone() for part, state in parts.items() for k, v in state.items()}
    return flat | {f"adapter.{k}": p.detach().clone() for k, p in student.adapter().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_each_stage_trains_its_own_parts(tmp_path: Path) -> None:
    trainer = Trainer(config_of(), student_of(config_of()), RandomSource(), tmp_path)
    states = [snapshot(trainer.student)]
    for until in (2, 4, 6):
        trainer.run(until)
        states.append(snapshot(trainer.student))
    assert changed(states[0], states[1]) == {"router"}
    assert changed(states[1], states[2]) == {"router", "policy"}
    assert changed(states[2], states[3]) == {"router", "policy", "adapter"}


def test_the_backbone_never_changes(tmp_path: Path) -> None:
    config = config_of()
    student = student_of(config)
    own = {n: p.clone() for n, p in student.transformer.named_parameters() if "lora" not in n}
    Trainer(config, student, RandomSource(), tmp_path).run()
    after = dict(student.transformer.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in own.items())


def test_a_restart_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = trained(config_of(), tmp_path / "whole")
    trained(config_of(), tmp_path / "parts", until=3)
    resumed = trained(config_of(), tmp_path / "parts")
    assert resumed.step == 6
    one, other = snapshot(whole.student), snapshot(resumed.student)
    assert not changed(one, other)
    rows = read_log(tmp_path / "parts" / "log.csv")
    assert [row["step"] for row in rows] == ["3", "6"]


def test_a_log_takes_in_what_a_later_stage_tells(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = CsvLog(path, after_step=0)
    log.write(1, {"loss": 0.5}, stage="router")
    log.write(2, {"loss": 0.25, "budget": 0.1}, stage="policy")
    log.write(3, {"budget": 0.2}, stage="policy")
    CsvLog(path, after_step=2).write(3, {"loss": 0.125}, stage="joint")
    assert [list(row.values()) for row in read_log(path)] == [
        ["1", "router", "0.5", ""],
        ["2", "policy", "0.25", "0.1"],
        ["3", "joint", "0.125", ""],
    ]


def test_another_configs_checkpoint_is_refused(tmp_path: Path) -> None:
    trained(config_of(), tmp_path, until=1)
    with pytest.raises(ShivaError, match="another config"):
        trained(config_of(target=0.5), tmp_path)


def test_arms_of_one_seed_see_the_same_samples(tmp_path: Path) -> None:
    arms = {
        "shiva": Arm(),
        "fixed": Arm(ratios=Ratios.FIXED),
        "random": Arm(scores=Scores.RANDOM, ratios=Ratios.FIXED, estimator=None),
        "dense": Arm(ratios=Ratios.DENSE, estimator=None),
    }
    seen = {}
    for name, arm in arms.items():
        source, config = RandomSource(), config_of(arm=arm)
        Trainer(config, student_of(config), source, tmp_path / name).run()
        seen[name] = source.seeds
    assert len(seen["shiva"]) == 12
    assert seen["fixed"] == seen["shiva"]
    # What learns in the joint stage alone begins there.
    assert seen["random"] == seen["dense"] == seen["shiva"][-4:]


@pytest.mark.parametrize("estimator", list(Estimator))
def test_every_estimator_teaches_the_router(estimator: Estimator, tmp_path: Path) -> None:
    config = config_of(
        arm=Arm(ratios=Ratios.FIXED, estimator=estimator), steps=Steps(router=1, policy=0, joint=0)
    )
    student = student_of(config)
    before = snapshot(student)
    Trainer(config, student, RandomSource(), tmp_path).run()
    assert changed(before, snapshot(student)) == {"router"}


@pytest.mark.parametrize(("target", "sign"), [(0.3, -1), (0.9, 1)])
def test_the_budget_pulls_the_mean_ratio(target: float, sign: int, tmp_path: Path) -> None:
    config = config_of(
        steps=Steps(router=0, policy=12, joint=0),
        target=target,
        weights={"budget": 1000.0, "distillation": 0.0, "output": 0.0},
    )
    student, sigmas = student_of(config), torch.linspace(0.05, 0.95, 19)
    with torch.no_grad():
        student.policy.anchor.fill_(0.4)
        before = float(student.policy(sigmas).mean())
    Trainer(config, student, RandomSource(), tmp_path).run()
    with torch.no_grad():
        assert (float(student.policy(sigmas).mean()) - before) * sign > 0.002


def test_the_dense_arm_prunes_nothing(tmp_path: Path) -> None:
    trainer = trained(config_of(arm=Arm(ratios=Ratios.DENSE, estimator=None)), tmp_path)
    rows = read_log(tmp_path / "log.csv")
    assert {row["keep_ratio"] for row in rows} == {"1"}
    assert list(trainer.groups) == ["adapter"]


def test_temperatures_fall_from_start_to_end() -> None:
    tau = config_of().tau_rank
    values = [annealed(tau, done) for done in (0.0, 0.25, 0.5, 0.75, 1.0, 2.0)]
    assert values[0] == tau.start
    assert values[-1] == values[-2] == pytest.approx(tau.end)
    assert values == sorted(values, reverse=True)
