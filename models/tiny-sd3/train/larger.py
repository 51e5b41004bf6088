# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Carry the shipped transformer on at 256 pixels: four times the image tokens, all else as it is.

The text encoders and the autoencoder are frozen and shared with the 128-pixel pipeline, so that
only the transformer is new. It starts from the shipped weights, whose position table is laid over
the larger picture (`set_positions`), and whose local features already fit: the velocity error on
256-pixel scenes is 0.14 before the first step (0.05 at 128 pixels).
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import StableDiffusion3Pipeline
from torch import nn
from torch.nn import functional

from train.common import (
    PIXELS,
    Averages,
    Budget,
    CurveLog,
    flat_then_linear,
    load_checkpoint,
    save_checkpoint,
    set_rate,
)
from train.export import save_half
from train.flow import (
    Ema,
    FlowPlan,
    average_gradients,
    make_batch,
    make_optimizers,
    noisy,
    t5_length,
)
from train.model import FlowNet, make_transformer, set_positions
from train.text import tokenizers
from train.vae import LatentCode

WARM_STEPS = 30
LOG_EVERY, SAVE_EVERY = 10, 50


@dataclass(frozen=True)
class LargerPlan:
    """What to carry on, for how long, and how."""

    work: Path
    pipeline: Path
    minutes: float
    batch: int = 16
    processes: int = 2
    pixels: int = 2 * PIXELS
    muon_rate: float = 1e-3
    adam_rate: float = 5e-4
    seed: int = 0

    @property
    def checkpoint(self) -> Path:
        """Where the state is kept."""
        return self.work / f"larger{self.pixels}.pt"


def load_shipped(net: FlowNet, folder: Path) -> None:
    """Put a saved pipeline's transformer and text encoders into the training network."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    parts = (
        (net.transformer, pipeline.transformer),
        (net.text.clip_1, pipeline.text_encoder),
        (net.text.clip_2, pipeline.text_encoder_2),
        (net.text.t5, pipeline.text_encoder_3),
    )
    for mine, shipped in parts:
        mine.load_state_dict(shipped.state_dict())


class LargerTrainer:
    """One process of the training."""

    def __init__(self, plan: LargerPlan, rank: int) -> None:
        self.plan, self.rank = plan, rank
        torch.manual_seed(plan.seed)
        self.code = LatentCode.at(plan.work / "latent_code.pt")
        self.net = FlowNet(plan.work)
        load_shipped(self.net, plan.pipeline)
        set_positions(self.net.transformer, plan.pixels)
        self.net.requires_grad_(False)
        self.net.transformer.requires_grad_(True)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        flow = FlowPlan(plan.work, plan.minutes, muon_rate=plan.muon_rate, adam_rate=plan.adam_rate)
        self.optimizers = make_optimizers(self.net, flow)
        self.rates = [group["lr"] for opt in self.optimizers for group in opt.param_groups]
        state = load_checkpoint(plan.checkpoint)
        self.ema = Ema(self.net.transformer)
        if state:
            self.net.transformer.load_state_dict(state["model"])
            self.ema.state = state["ema"]
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
        self.step = state["step"] if state else 0
        self.budget = Budget(plan.minutes, state["spent"] if state else 0.0)
        self.resumed = state is not None

    def run(self) -> None:
        """Train until the time is used up."""
        name, log = f"flow{self.plan.pixels}", None
        if self.rank == 0:
            log = CurveLog(self.plan.work / "logs" / f"{name}.csv", name, append=self.resumed)
        averages = Averages()
        while (progress := self._shared_progress()) < 1:
            averages.add(**self._train_step(progress))
            self.step += 1
            self.ema.update(self.net.transformer, self.step)
            if log and (self.step % LOG_EVERY == 0 or self.step <= 3):
                log.write(self.budget, step=self.step, **averages.take())
            if log and self.step % SAVE_EVERY == 0:
                self.save()
        if log:
            self.save()

    def _shared_progress(self) -> float:
        """Process 0's clock decides for all, or they would stop at different steps."""
        progress = torch.tensor(self.budget.progress)
        if dist.is_initialized():
            dist.broadcast(progress, 0)
        return float(progress)

    def _train_step(self, progress: float) -> dict[str, float]:
        warm = min(1, (self.step + 1) / WARM_STEPS)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            set_rate([optimizer], rate * warm * flat_then_linear(progress))
        seed = (self.plan.seed * 1_000_003 + self.step) * 64 + self.rank
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        batch = make_batch(rng, self.code, self.plan.batch, self.plan.pixels)
        mixed, time, target = noisy(batch.latents, generator)
        tokens = self.net.text.tokenize(batch.captions, t5_length(rng))
        with torch.autocast("cpu", torch.bfloat16):
            context = self.net.text(tokens, generator)
            velocity = self.net.velocity(mixed, time, context)
        mse = functional.mse_loss(velocity.float(), target)
        self.net.zero_grad(set_to_none=True)
        mse.backward()
        average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return {"mse": mse.item(), "gradient_norm": norm.item()}

    def save(self) -> None:
        """Keep everything a restart needs."""
        save_checkpoint(
            self.plan.checkpoint,
            model=self.net.transformer.state_dict(),
            ema=self.ema.state,
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            step=self.step,
            spent=self.budget.elapsed,
        )


def _work(rank: int, plan: LargerPlan) -> None:
    torch.set_num_threads(1)
    meeting = plan.work / "meeting_larger"
    if plan.processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting.resolve()}", rank=rank, world_size=plan.processes
        )
    LargerTrainer(plan, rank).run()
    if plan.processes > 1:
        dist.destroy_process_group()


def train_larger(plan: LargerPlan) -> None:
    """Train in `plan.processes` processes; a second call continues where the first ended."""
    (plan.work / "meeting_larger").unlink(missing_ok=True)
    # Files that every process reads: once, before they race for them.
    LatentCode.at(plan.work / "latent_code.pt")
    tokenizers(plan.work / "tokenizers")
    if plan.processes == 1:
        _work(0, plan)
    else:
        torch.multiprocessing.spawn(_work, (plan,), nprocs=plan.processes)


def export_larger(plan: LargerPlan, folder: Path) -> None:
    """Write the averaged weights as a transformer folder, in float16.

    Raises:
        FileNotFoundError: nothing was trained in `plan.work`.
    """
    state = load_checkpoint(plan.checkpoint)
    if state is None:
        raise FileNotFoundError(f"{plan.checkpoint}: train first (`python -m train larger`)")
    transformer = make_transformer()
    transformer.load_state_dict(state["ema"])
    transformer.register_to_config(sample_size=plan.pixels // 8)
    save_half(transformer.eval(), folder)
    print(f"wrote {folder} after {state['step']} steps", flush=True)
