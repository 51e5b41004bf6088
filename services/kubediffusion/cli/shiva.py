# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`kubediffusion shiva`: train a pruning artifact, measure it, ship it.

Everything that needs torch is imported inside a command: the CLI starts without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kubediffusion.cli.shell import notes, output, reporting
from kubediffusion.errors import InvalidInput

if TYPE_CHECKING:
    from shiva_kernels.training.commands import RunSpec

shiva = typer.Typer(
    name="shiva",
    help="Static-budget token pruning: train, evaluate, export, plot, benchmark, study.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[Path, typer.Argument(help="A training's folder.", show_default=False)]
Pipeline = Annotated[
    Path, typer.Option(metavar="FOLDER", help="A Stable Diffusion 3 pipeline in diffusers' layout.")
]
Transformer = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="A transformer to take instead of the pipeline's own."),
]
Pixels = Annotated[int, typer.Option(min=16, help="Width and height of the pictures.")]
Shapes = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="The shapes world's trainer: models/tiny-sd3."),
]
Json = Annotated[bool, typer.Option("--json", help="For a program to read.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]


def register(app: typer.Typer) -> None:
    app.add_typer(shiva)


@contextmanager
def _working(debug: bool) -> Iterator[None]:
    """The library's errors are the caller's to mend; a missing package is named with its extra."""
    with reporting(debug):
        try:
            import shiva_kernels
            from shiva_kernels.errors import ShivaError
        except ImportError as error:
            raise _missing(error) from error
        del shiva_kernels
        try:
            yield
        except ShivaError as error:
            raise InvalidInput(str(error)) from error
        except ImportError as error:
            raise _missing(error) from error


def _missing(error: ImportError) -> InvalidInput:
    return InvalidInput(
        f"{error.name or error} is not installed: pip install 'kubediffusion[train]'"
    )


def _spec(
    pipeline: Path, transformer: Path | None, pixels: int, data: Path | None, shapes: Path | None
) -> RunSpec:
    from shiva_kernels.training.commands import RunSpec

    def text(path: Path | None) -> str | None:
        return None if path is None else str(path)

    return RunSpec(str(pipeline), text(transformer), pixels, text(data), text(shapes))


@shiva.command()
def train(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="The training's.")],
    pipeline: Pipeline,
    transformer: Transformer = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="YAML; the paper's values without."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Pictures with captions: NAME.png beside NAME.txt."),
    ] = None,
    shapes: Shapes = None,
    pixels: Pixels = 1024,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    until: Annotated[
        int | None, typer.Option(min=1, help="Stop after this step; all of them without.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Train router, ratio policy and adapter; the same command goes on where it was stopped.

    For several processes: accelerate launch -m kubediffusion.cli shiva train …
    """
    with _working(debug):
        from shiva_kernels.training.commands import train as run

        spec = _spec(pipeline, transformer, pixels, data, shapes)
        steps = run(out, spec, config, precision=precision, until=until)
        output().print(f"{out}: {steps} steps")


@shiva.command()
def evaluate(
    folder: Folder,
    budget: Annotated[
        list[float] | None, typer.Option(help="0.8, 0.6 and 0.4 without. Repeatable.")
    ] = None,
    samples: Annotated[int, typer.Option(min=8, help="Fixed (prompt, noise, time).")] = 128,
    prompts: Annotated[int, typer.Option(min=0, help="Pictures to draw and judge.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 28,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a training: velocity error to dense, and pictures where a checker exists."""
    with _working(debug):
        from shiva_kernels.training.assemble import BUDGETS
        from shiva_kernels.training.commands import evaluate as run

        budgets = tuple(budget) if budget else BUDGETS
        _show(run(folder, budgets=budgets, samples=samples, prompts=prompts, steps=steps), as_json)


@shiva.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="The artifact's.")],
    debug: Debug = False,
) -> None:
    """Write the artifact that a workflow names: safetensors and JSON."""
    with _working(debug):
        from shiva_kernels.training.commands import export as run

        output().print(str(run(folder, out)))


@shiva.command()
def plot(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Of the pictures.")],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Whose picture shows what is kept.")
    ] = "a red circle above a blue square",
    seed: Annotated[int, typer.Option(help="Of that picture.")] = 0,
    budget: Annotated[float, typer.Option(help="Whose table is shown.")] = 0.6,
    debug: Debug = False,
) -> None:
    """Draw training curves, keep ratios by block and time, and keep maps over a picture."""
    with _working(debug):
        from shiva_kernels.training.commands import plot as run

        for path in run(folder, out, prompt=prompt, seed=seed, budget=budget):
            output().print(str(path))


@shiva.command()
def benchmark(
    artifact: Annotated[Path, typer.Argument(help="An artifact's folder.", show_default=False)],
    pipeline: Pipeline,
    transformer: Transformer = None,
    pixels: Pixels = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Of each budget, in turns.")] = 5,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time the transformer, dense and at every budget, in CPU seconds and FLOPs."""
    with _working(debug):
        from dataclasses import asdict

        from shiva_kernels.training.commands import benchmark as run

        spec = _spec(pipeline, transformer, pixels, None, None)
        rows = [asdict(row) for row in run(artifact, spec, rounds=rounds)]
        if as_json:
            return _show(rows, as_json)
        for row in rows:
            name = "dense" if row["budget"] is None else f"{row['budget']:g}"
            output().print(
                f"{name:>6}  {row['seconds']:.3f} s  {row['flops'] / 1e9:.1f} GFLOP  "
                f"x{row['speed_up']:.2f}  {100 * row['share_of_limit']:.0f} % of the FLOPs limit"
            )
    return None


@shiva.command()
def study(
    shapes: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The shapes world: pipeline and trainer.")
    ] = Path("models/tiny-sd3"),
    results: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the tables go.")] = Path(
        "benchmarks/results/shiva-study"
    ),
    runs: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where trainings are cached.")
    ] = Path("out/shiva-study"),
    part: Annotated[
        list[str] | None, typer.Option(help="A, B, C or D; all without. Repeatable.")
    ] = None,
    scale: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with sizes other than the default.")
    ] = None,
    cpu_hours: Annotated[float, typer.Option(help="Where to stop; started again, it goes on.")] = 6,
    pixels: Pixels = 256,
    debug: Debug = False,
) -> None:
    """Compare estimators and arms on the shapes world; what is done is never done again."""
    with _working(debug):
        from shiva_kernels.training.study_driver import run_study

        def say(line: str) -> None:
            notes().print(line, style="dim")

        for name, path in run_study(
            results=results,
            runs=runs,
            pipeline=shapes / "pipeline",
            transformer=shapes.with_name(f"{shapes.name}-{pixels}") / "transformer",
            trainer=shapes,
            parts=part,
            scale_file=scale,
            cpu_hours=cpu_hours,
            pixels=pixels,
            say=say,
        ):
            output().print(f"{name}: {path}")


def _show(content: Any, as_json: bool) -> None:
    import json

    if as_json:
        output().print(json.dumps(content))
    else:
        output().print(json.dumps(content, indent=1))
