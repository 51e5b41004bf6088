# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What `kubediffusion shiva` does, as functions: a training lives in one folder."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shiva_kernels.artifact import Artifact
from shiva_kernels.config import Guidance, KeepMap, ShivaConfig
from shiva_kernels.errors import ShivaError
from shiva_kernels.flops import cost_model
from shiva_kernels.tables import build_table
from shiva_kernels.training import plots
from shiva_kernels.training.assemble import (
    BUDGETS,
    curve_of,
    finished_artifact,
    image_tokens,
    load_pipeline,
    make_student,
)
from shiva_kernels.training.config import TrainConfig, load_config
from shiva_kernels.training.data import Captions, FolderSource, ShapesSource, Source
from shiva_kernels.training.evaluation import (
    Sampling,
    draw,
    fixed_samples,
    right,
    shape_cases,
    sigma_grid,
    table_schedule,
    velocity_errors,
)
from shiva_kernels.training.logs import trackers
from shiva_kernels.training.runs import write_json
from shiva_kernels.training.statistics import bootstrap_mean, paired_difference
from shiva_kernels.training.student import Student
from shiva_kernels.training.trainer import Trainer

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunSpec:
    """Model and data of a training; `data` is a folder of pictures, or None for the shapes world.

    `shapes` is the folder of the small model's trainer, which draws that world.
    """

    pipeline: str
    transformer: str | None
    pixels: int
    data: str | None
    shapes: str | None

    def source(self, pipeline: Any, *, held_out: bool = False) -> Source:
        """Where batches come from. Raises ShivaError where neither kind of data is named."""
        if self.data is not None:
            return FolderSource(Path(self.data), pipeline, self.pixels)
        if self.shapes is None:
            raise ShivaError("no data: give --data FOLDER, or --shapes models/tiny-sd3")
        share = 1.0 if held_out else 0.6
        return ShapesSource(
            Path(self.shapes), pipeline, self.pixels, held_out=held_out, pair_share=share
        )


@dataclass
class Training:
    """A training's folder, opened: the pipeline, the student as far as it is trained."""

    folder: Path
    spec: RunSpec
    config: TrainConfig
    pipeline: Any
    student: Student
    step: int = 0

    @classmethod
    def new(cls, folder: Path, spec: RunSpec, config: TrainConfig) -> Training:
        """With nothing trained yet, and nothing written."""
        transformer = Path(spec.transformer) if spec.transformer else None
        pipeline = load_pipeline(Path(spec.pipeline), transformer)
        student = make_student(pipeline, config, pixels=spec.pixels)
        return cls(folder, spec, config, pipeline, student)

    @classmethod
    def open(cls, folder: Path) -> Training:
        """As far as it was trained. Raises ShivaError where nothing was, in `folder`."""
        try:
            kept = json.loads((folder / "run.json").read_text())
        except OSError as error:
            raise ShivaError(f"{folder}: no training there (no run.json)") from error
        if not (folder / "checkpoint.pt").exists():
            raise ShivaError(f"{folder}: no checkpoint yet; `shiva train` writes one")
        config = TrainConfig.model_validate(kept["config"])
        opened = cls.new(folder, RunSpec(**kept["spec"]), config)
        opened.step = opened.trainer(opened.spec.source(opened.pipeline)).step
        return opened

    def trainer(self, source: Source, accelerator: Accelerator | None = None) -> Trainer:
        """The training loop, its last checkpoint restored into the student."""
        shift = self.pipeline.scheduler.config.shift
        return Trainer(
            self.config, self.student, source, self.folder, shift=shift, accelerator=accelerator
        )

    def table(self, budget: float, steps: int) -> Any:
        """k[step][block] on a sampler's grid."""
        tokens = image_tokens(self.pipeline.transformer, self.spec.pixels)
        grid = sigma_grid(self.pipeline.scheduler, steps)
        return build_table(curve_of(self.student), budget, grid, tokens)


def train(
    folder: Path,
    spec: RunSpec,
    config_file: Path | None,
    *,
    precision: str = "no",
    until: int | None = None,
) -> int:
    """Train in `folder`, or go on there; returns the optimiser steps done.

    `until` stops after that many of the config's steps, at their rates: going on changes nothing.

    Raises:
        ShivaError: the folder holds a training of another config or other data.
    """
    config = load_config(config_file) if config_file is not None else TrainConfig()
    kept = {"spec": asdict(spec), "config": config.model_dump(mode="json")}
    path = folder / "run.json"
    if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(kept)):
        raise ShivaError(f"{path}: this folder trains something else; take another --out")
    training = Training.new(folder, spec, config)
    source = spec.source(training.pipeline)
    logging_to = trackers()
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=logging_to,  # type: ignore[arg-type]
        project_dir=str(folder),
        cpu=not torch.cuda.is_available(),
    )
    if accelerator.is_main_process:
        write_json(path, kept)
    if logging_to:
        accelerator.init_trackers("tensorboard")
    trainer = training.trainer(source, accelerator)
    trainer.run(until)
    accelerator.end_training()
    return trainer.step


def evaluate(
    folder: Path,
    *,
    budgets: Sequence[float] = BUDGETS,
    samples: int = 128,
    prompts: int = 0,
    steps: int = 28,
    seed: int = 7,
) -> dict[str, Any]:
    """Velocity error to dense at each budget; with `prompts`, pictures and their accuracy too.

    Writes `evaluation.json` into the training's folder. The shapes' held-out side is used where the
    training was on shapes; a folder of pictures is measured on itself, and the report says so.
    """
    training = Training.open(folder)
    source = training.spec.source(training.pipeline, held_out=True)
    drawn = list(
        fixed_samples(source, samples, training.pipeline.scheduler.config.shift, seed=seed)
    )
    plain = velocity_errors(training.student, drawn, None)
    report: dict[str, Any] = {
        "samples": samples,
        "held_out": training.spec.data is None,
        "seed": seed,
        "dense_of_the_artifact": {"to_dense": float(plain.to_dense.mean())},
        "budgets": {},
    }
    for budget in budgets:
        table = training.table(budget, steps)
        errors = velocity_errors(training.student, drawn, table_schedule(table))
        report["budgets"][f"{budget:g}"] = {
            "mean_keep_ratio": table.mean_keep_ratio,
            "to_dense": bootstrap_mean(errors.to_dense).as_dict(),
            "to_data": float(errors.to_data.mean()),
        }
    if prompts:
        report["pictures"] = _evaluate_pictures(training, budgets, prompts, steps)
    write_json(folder / "evaluation.json", report)
    return report


def _evaluate_pictures(
    training: Training, budgets: Sequence[float], prompts: int, steps: int
) -> dict[str, Any]:
    if training.spec.shapes is None:
        raise ShivaError("--prompts needs a checker: only the shapes world has one (--shapes)")
    trainer, sampling = (
        Path(training.spec.shapes),
        Sampling(steps=steps, pixels=training.spec.pixels),
    )
    cases = shape_cases(trainer, prompts, 1, stream=30_000)
    asked = ([case.prompt for case in cases], [case.seed for case in cases])

    def correct(budget: float | None) -> Any:
        schedule = None if budget is None else table_schedule(training.table(budget, steps))
        pictures = draw(training.student, training.pipeline, *asked, sampling, schedule)
        return right(trainer, cases, pictures)

    dense = correct(None)
    rows: dict[str, Any] = {"dense_of_the_artifact": bootstrap_mean(dense).as_dict()}
    for budget in budgets:
        mine = correct(budget)
        rows[f"{budget:g}"] = {
            "right": bootstrap_mean(mine).as_dict(),
            "minus_dense": paired_difference(mine, dense).as_dict(),
        }
    return rows


def export(folder: Path, out: Path) -> Path:
    """Write the artifact: router, policy, adapter, and a table for each budget with its quality."""
    training = Training.open(folder)
    quality: dict[float, dict[str, Any]] = {}
    path = folder / "evaluation.json"
    if path.exists():
        report = json.loads(path.read_text())
        quality = {
            float(budget): {
                "velocity_mse_to_dense": row["to_dense"]["mean"],
                "samples": report["samples"],
            }
            for budget, row in report["budgets"].items()
        }
    return finished_artifact(training.student, quality, step=training.step).save(out)


def plot(folder: Path, out: Path, *, prompt: str, seed: int = 0, budget: float = 0.6) -> list[Path]:
    """Training curves, keep ratios of the budget, and what is kept of one drawn picture."""
    training = Training.open(folder)
    made = [plots.training_curves(folder / "log.csv", out / "training.png")]
    steps = 28
    table = training.table(budget, steps)
    made.append(plots.keep_ratios(table, out / "keep_ratios.png"))
    maps = _keep_maps(training, budget, prompt, seed, steps)
    sampling = Sampling(steps=steps, pixels=training.spec.pixels)
    schedule = table_schedule(table)
    picture = draw(training.student, training.pipeline, [prompt], [seed], sampling, schedule)[0]
    side = round(image_tokens(training.pipeline.transformer, training.spec.pixels) ** 0.5)
    made.append(plots.keep_maps(picture, maps, side, out / "keep_maps.png"))
    return made


def _keep_maps(
    training: Training, budget: float, prompt: str, seed: int, steps: int
) -> list[KeepMap]:
    """What each block keeps at four moments of a request, through the library's own way in."""
    artifact = finished_artifact(training.student)
    transformer = Path(training.spec.transformer) if training.spec.transformer else None
    pipeline = load_pipeline(Path(training.spec.pipeline), transformer)
    from shiva_kernels.apply import apply_shiva

    maps: list[KeepMap] = []
    handle = apply_shiva(
        pipeline.transformer, ShivaConfig(artifact, budget=budget, on_keep=maps.append)
    )
    grid = sigma_grid(pipeline.scheduler, steps)
    with handle.request(budget, sigmas=grid, guidance=Guidance.PAIR).steps():
        pipeline(
            prompt,
            num_inference_steps=steps,
            height=training.spec.pixels,
            width=training.spec.pixels,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )
    seen = sorted({entry.sigma for entry in maps}, reverse=True)
    chosen = {seen[int(share * (len(seen) - 1))] for share in (0.0, 0.33, 0.66, 1.0)}
    return [entry for entry in maps if entry.sigma in chosen]


# ---------------------------------------------------------------- speed


@dataclass(frozen=True)
class Speed:
    """One budget against dense: medians of CPU seconds, taken in turns, and FLOPs of the same."""

    budget: float | None
    seconds: float
    flops: float
    speed_up: float
    share_of_limit: float


@torch.no_grad()
def benchmark(
    artifact: Path,
    spec: RunSpec,
    *,
    rounds: int = 5,
    steps: int = 4,
    clock: Callable[[], float] = time.process_time,
) -> list[Speed]:
    """CPU time of a guided forward over a short grid, dense and at each budget, alternating.

    `share_of_limit` is the speed-up over what the FLOPs alone would give.
    """
    from shiva_kernels.apply import apply_shiva

    pipeline = load_pipeline(
        Path(spec.pipeline), Path(spec.transformer) if spec.transformer else None
    )
    loaded = Artifact.load(artifact)
    handle = apply_shiva(pipeline.transformer, ShivaConfig(loaded, budget=None))
    context, pooled = Captions(pipeline).encode(["", "a red circle above a blue square"])
    side = spec.pixels // 8
    latents = torch.randn(1, pipeline.transformer.config.in_channels, side, side).repeat(2, 1, 1, 1)
    grid = sigma_grid(pipeline.scheduler, steps)

    def run(budget: float | None) -> None:
        request = handle.request(budget, sigmas=grid, guidance=Guidance.PAIR)
        for sigma in grid:
            with request.step(sigma):
                pipeline.transformer(
                    latents, context, pooled, torch.full((2,), 1000 * sigma), return_dict=False
                )

    choices: list[float | None] = [None, *sorted(loaded.tables, reverse=True)]
    cost = cost_model(pipeline.transformer, len(latents), (side, side), context.shape[1])
    flops: dict[float | None, float] = {None: cost.dense.true}
    for budget in loaded.tables:
        flops[budget] = cost.of_table(handle.table(budget, grid, cost.tokens)).true
    run(None)
    times: dict[float | None, list[float]] = {budget: [] for budget in choices}
    for _ in range(rounds):
        for budget in choices:
            began = clock()
            run(budget)
            times[budget].append(clock() - began)
    medians = {budget: statistics.median(values) for budget, values in times.items()}
    return [
        Speed(
            budget,
            medians[budget],
            flops[budget],
            medians[None] / medians[budget],
            (medians[None] / medians[budget]) / (flops[None] / flops[budget]),
        )
        for budget in choices
    ]
