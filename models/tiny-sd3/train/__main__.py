# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m train all`: from nothing to the pipeline, its ControlNet, its LoRA and the numbers.

Each stage keeps its state in the work folder: a stage that was stopped continues where it was, and
one that was finished ends at once.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from train.adapters import export_adapter, train_adapter
from train.common import PIXELS
from train.curves import draw_curves
from train.evaluate import evaluate_pipeline
from train.evaluate_adapters import measure_control, measure_lora
from train.export import export_pipeline
from train.flow import FlowPlan, train_flow
from train.larger import LargerPlan, export_larger, train_larger
from train.reading import ReadingPlan, train_reading
from train.vae import LatentCode, train_vae

HERE = Path(__file__).resolve().parent.parent
MINUTES = {
    "decoder": 16.0,
    "encoder": 12.0,
    "reading": 4.0,
    "flow": 92.0,
    "controlnet": 16.0,
    "lora": 12.0,
    "larger": 90.0,
}
ADAM_RATES = {"flow": 1e-3, "controlnet": 1e-3, "lora": 2e-3}


def _plan(args: argparse.Namespace, stage: str) -> FlowPlan:
    return FlowPlan(
        work=args.work,
        minutes=MINUTES[stage] * args.scale,
        pixels=args.pixels,
        batch=args.batch,
        adam_rate=ADAM_RATES[stage],
        processes=args.processes,
        seed=args.seed,
        start=args.work / f"flow{PIXELS}.pt" if args.pixels != PIXELS else None,
    )


def run_latents(args: argparse.Namespace) -> None:
    """Fit the latent code. Latents are computed as scenes are drawn, so none are stored."""
    code = LatentCode.at(args.work / "latent_code.pt")
    print(f"latent code of {tuple(code.projection.shape)} in {args.work}", flush=True)


def run_vae(args: argparse.Namespace) -> None:
    """Train the decoder and the encoder side by side."""
    run_latents(args)
    # Only functions of importable modules can be sent to a spawned process.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(train_vae, args.work, part, MINUTES[part] * args.scale, args.seed)
            for part in ("decoder", "encoder")
        ]
        for job in jobs:
            job.result()


def run_reading(args: argparse.Namespace) -> None:
    """Teach the text encoders who stands where."""
    train_reading(ReadingPlan(args.work, MINUTES["reading"] * args.scale, seed=args.seed))


def run_flow(args: argparse.Namespace) -> None:
    """Train the transformer and the text encoders; at 256 pixels from the 128-pixel ones."""
    train_flow(_plan(args, "flow"))


def run_controlnet(args: argparse.Namespace) -> None:
    """Train the ControlNet on the frozen pipeline."""
    train_adapter(_plan(args, "controlnet"), "controlnet")


def run_lora(args: argparse.Namespace) -> None:
    """Train the LoRA on the frozen pipeline."""
    train_adapter(_plan(args, "lora"), "lora")


def run_larger(args: argparse.Namespace) -> None:
    """Carry the shipped transformer on at 256 pixels, and write it beside the pipeline."""
    minutes = MINUTES["larger"] * args.scale
    plan = LargerPlan(args.work, args.out / "pipeline", minutes, processes=args.processes)
    train_larger(plan)
    export_larger(plan, HERE.parent / f"tiny-sd3-{plan.pixels}" / "transformer")
    draw_curves(args.work / "logs", args.out / "results")


def run_export(args: argparse.Namespace) -> None:
    """Write what is trained in diffusers' layout, and the training curves."""
    export_pipeline(args.work, args.out / "pipeline", args.pixels)
    for stage, folder in (("controlnet", "controlnets/edges"), ("lora", "loras/outline")):
        if (args.work / f"{stage}.pt").exists():
            export_adapter(_plan(args, stage), stage, args.out / folder)
    draw_curves(args.work / "logs", args.out / "results")


def run_evaluate(args: argparse.Namespace) -> None:
    """Measure the exported files on held-out captions."""
    torch.set_num_threads(1)
    folder, results = args.out / "pipeline", args.out / "results"
    for length in args.lengths:
        evaluate_pipeline(
            folder, results, args.images, args.steps, args.guidance, length, args.pixels
        )
    if args.pixels != PIXELS:
        return  # the adapters are the 128-pixel transformer's
    length, fewer = min(args.lengths), max(2, args.images // 3)
    edges, outline = args.out / "controlnets" / "edges", args.out / "loras" / "outline"
    if edges.exists():
        measure_control(folder, edges, results, fewer, length)
    if outline.exists():
        measure_lora(folder, outline, results, fewer, length)


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "latents": run_latents,
    "vae": run_vae,
    "reading": run_reading,
    "flow": run_flow,
    "controlnet": run_controlnet,
    "lora": run_lora,
    "export": run_export,
    "evaluate": run_evaluate,
    "larger": run_larger,
}

# `larger` carries on what is shipped, and is asked for by name.
FROM_NOTHING = [stage for stage in STAGES if stage != "larger"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, default=HERE / "work", help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=HERE, help="where pipeline/ and so on go")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every stage's minutes")
    parser.add_argument("--pixels", type=int, default=PIXELS, choices=[PIXELS, 2 * PIXELS])
    parser.add_argument("--batch", type=int, default=32, help="scenes a step and process")
    parser.add_argument("--processes", type=int, default=2, help="of the flow training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=300, help="to measure, a kind of caption")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 32], help="T5 lengths")
    return parser.parse_args()


def main() -> None:
    """Run one stage, or all of them."""
    args = _arguments()
    (args.work / "logs").mkdir(parents=True, exist_ok=True)
    for stage in FROM_NOTHING if args.stage == "all" else [args.stage]:
        print(f"--- {stage}", flush=True)
        STAGES[stage](args)


if __name__ == "__main__":
    main()
