# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`kubediffusion shiva` on the shipped pipeline: from a config file to an artifact that prunes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from kubediffusion.cli.app import app
from shiva_kernels.apply import apply_shiva
from shiva_kernels.artifact import Artifact
from shiva_kernels.config import Guidance, KeepMap, ShivaConfig
from shiva_kernels.training.assemble import load_pipeline
from shiva_kernels.training.data import ShapesSource
from shiva_kernels.training.evaluation import Sample, fixed_samples

TINY = Path(__file__).resolve().parents[3] / "models" / "tiny-sd3"
PIPELINE = TINY / "pipeline"
CONFIG = """\
steps: {router: 2, policy: 1, joint: 1}
micro_batches: 2
micro_batch: 1
warmup: 0
rank: 2
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["shiva", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    (folder / "config.yaml").write_text(CONFIG)
    out = folder / "run"
    for until, done in ((["--until", 2], "2 steps"), ([], "4 steps")):
        result = invoke(
            *("train", "--out", out, "--pipeline", PIPELINE, "--shapes", TINY, "--pixels", 128),
            *("--config", folder / "config.yaml", *until),
        )
        assert result.exit_code == 0, result.output
        assert done in result.output
    return out


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom kubediffusion.cli.app import app\n"
        "result = CliRunner().invoke(app, ['shiva', 'train', '--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        "assert 'torch' not in sys.modules and 'shiva_kernels' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_mistakes_are_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("target: 1.5\n")
    cases = {
        "no data": ["train", "--out", tmp_path / "a", "--pipeline", PIPELINE],
        "target": [
            *("train", "--out", tmp_path / "b", "--pipeline", PIPELINE),
            *("--config", tmp_path / "config.yaml"),
        ],
        "no training there": ["export", tmp_path, "--out", tmp_path / "c"],
    }
    for said, arguments in cases.items():
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert said in result.output
        assert "bug" not in result.output


def test_other_data_in_the_same_folder_is_refused(trained: Path) -> None:
    result = invoke(
        "train", "--out", trained, "--pipeline", PIPELINE, "--shapes", TINY, "--pixels", 256
    )
    assert result.exit_code == 1
    assert "trains something else" in result.output


def test_a_training_is_measured_and_shipped(trained: Path, tmp_path: Path) -> None:
    result = invoke("evaluate", trained, "--samples", 8, "--steps", 4, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    errors = [report["budgets"][b]["to_dense"]["mean"] for b in ("0.8", "0.6", "0.4")]
    assert 0 < errors[0] < errors[1] < errors[2]

    result = invoke("export", trained, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    artifact = Artifact.load(tmp_path)
    assert sorted(artifact.tables) == [0.4, 0.6, 0.8]
    assert artifact.training["step"] == 4
    assert artifact.tables[0.6].quality["velocity_mse_to_dense"] == pytest.approx(errors[1])
    for budget in artifact.tables:
        assert artifact.reference_table(budget).mean_keep_ratio == pytest.approx(budget, abs=0.01)


def test_the_artifact_prunes_as_the_training_did(trained: Path, tmp_path: Path) -> None:
    assert invoke("export", trained, "--out", tmp_path).exit_code == 0
    pipeline, maps = load_pipeline(PIPELINE), list[KeepMap]()
    config = ShivaConfig(Artifact.load(tmp_path), budget=0.6, on_keep=maps.append)
    handle = apply_shiva(pipeline.transformer, config)
    table = handle.table(0.6)
    shapes = ((1, 16, 16, 16), (1, 40, 128), (1, 128))
    latents, context, pooled = (torch.randn(shape) for shape in shapes)
    with torch.no_grad(), handle.request(guidance=Guidance.NONE).step(table.sigmas[3]):
        time = torch.tensor([1000 * table.sigmas[3]])
        pipeline.transformer(latents, context, pooled, time)
    kept = {entry.block: entry.index.shape[1] for entry in maps}
    assert kept == {b: k for b, k in enumerate(table.k[3]) if k < table.tokens}


def test_pictures_of_a_training_are_drawn(trained: Path, tmp_path: Path) -> None:
    result = invoke("plot", trained, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "training.png",
        "keep_ratios.png",
        "keep_maps.png",
    }


def test_speed_is_told_beside_flops(trained: Path, tmp_path: Path) -> None:
    assert invoke("export", trained, "--out", tmp_path).exit_code == 0
    options = ("--pipeline", PIPELINE, "--pixels", 128, "--rounds", 1, "--json")
    rows = json.loads(invoke("benchmark", tmp_path, *options).stdout)
    assert [row["budget"] for row in rows] == [None, 0.8, 0.6, 0.4]
    flops = [row["flops"] for row in rows]
    assert flops == sorted(flops, reverse=True)
    assert flops[2] < 0.85 * flops[0]  # of 120 tokens 56 are text, and all of these stay


def test_the_shipped_artifact_prunes_the_shipped_transformer() -> None:
    folder = TINY.with_name("tiny-sd3-256")
    transformer = load_pipeline(PIPELINE, folder / "transformer").transformer
    handle = apply_shiva(transformer, ShivaConfig(folder / "pruning", budget=0.6))
    for budget in (0.8, 0.6, 0.4):
        assert handle.table(budget).tokens == 256
        assert handle.table(budget).mean_keep_ratio == pytest.approx(budget, abs=0.005)


@torch.no_grad()
def test_the_shipped_artifact_is_as_good_as_it_says() -> None:
    """On scenes, noise and times that neither its training nor its measurement saw."""
    folder = TINY.with_name("tiny-sd3-256")
    pipeline = load_pipeline(PIPELINE, folder / "transformer")
    source = ShapesSource(TINY, pipeline, 256, held_out=True)
    shift = pipeline.scheduler.config.shift
    samples = list(fixed_samples(source, 16, shift, size=4, seed=4321))

    def velocity(sample: Sample) -> torch.Tensor:
        times = torch.full((len(sample.mixed),), 1000 * sample.sigma)
        batch = sample.batch
        return pipeline.transformer(sample.mixed, batch.context, batch.pooled, times).sample

    dense = [velocity(sample) for sample in samples]
    handle = apply_shiva(pipeline.transformer, ShivaConfig(folder / "pruning", budget=0.6))
    for budget in (0.8, 0.6, 0.4):
        errors: list[float] = []
        for sample, truth in zip(samples, dense, strict=True):
            with handle.request(budget, guidance=Guidance.NONE).step(sample.sigma):
                errors.append((velocity(sample) - truth).square().mean().item())
        said = handle.artifact.tables[budget].quality["velocity_mse_to_dense"]
        assert sum(errors) / len(errors) < 2 * said


def test_the_log_is_in_tensorboard_too(trained: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(next(trained.rglob("events.out*")).parent))
    events.Reload()
    assert [event.step for event in events.Scalars("keep_ratio")] == [2, 4]
