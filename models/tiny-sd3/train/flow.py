# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Flow matching of the transformer and the text encoders, on scenes drawn as they are needed."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from train.common import (
    PIXELS,
    VAE_FACTOR,
    Averages,
    Budget,
    CurveLog,
    flat_then_linear,
    load_checkpoint,
    save_checkpoint,
    set_rate,
    to_tensor,
)
from train.model import FlowNet, set_positions
from train.muon import SharedMuon
from train.reading import UNKNOWN, place_labels
from train.text import T5_FULL_LENGTH, decorate, tokenizers
from train.vae import LatentCode
from train.world import (
    BACKGROUNDS,
    CLASSES,
    PLACES,
    Scene,
    caption,
    draw,
    is_held_out,
    sample_scene,
    token_labels,
)

SHIFT = 1.5  # of the noise schedule, in training and in the scheduler that is shipped
UNIFORM_SHARE = 0.2
HIGH_NOISE, HIGH_NOISE_SHARE = 0.85, 0.25
EMPTY_SHARE, GENERAL_SHARE, VAGUE_SHARE = 0.09, 0.02, 0.08
FULL_LENGTH_SHARE = 0.2
SHORTEST, LONGEST = 24, 80
AUX_WEIGHT, READING_WEIGHT, BACKGROUND_WEIGHT = 0.3, 0.05, 0.2
EMA_DECAY = 0.999


@dataclass(frozen=True)
class FlowPlan:
    """How long and how large."""

    work: Path
    minutes: float
    pixels: int = PIXELS
    batch: int = 32
    muon_rate: float = 2e-3
    adam_rate: float = 1e-3
    processes: int = 2
    seed: int = 0
    start: Path | None = None

    @property
    def checkpoint(self) -> Path:
        """Where the state is kept."""
        return self.work / f"flow{self.pixels}.pt"


@dataclass(frozen=True)
class Batch:
    """Latents, what their cells show, captions, and what these say is where."""

    latents: torch.Tensor
    labels: torch.Tensor
    captions: list[str]
    places: torch.Tensor


def make_batch(rng: random.Random, code: LatentCode, size: int, pixels: int) -> Batch:
    """Scenes from the training side of the split, with captions that are sometimes left out."""
    images, labels, captions, places = [], [], [], []
    while len(images) < size:
        scene = sample_scene(rng)
        if is_held_out(scene):
            continue
        images.append(draw(scene, pixels))
        labels.append(token_labels(scene, pixels // VAE_FACTOR))
        text, complete = flow_caption(scene, rng)
        captions.append(text)
        places.append(place_labels(scene) if complete else [UNKNOWN] * len(PLACES))
    latents = code.encode(to_tensor(np.stack(images)))
    return Batch(latents, torch.from_numpy(np.stack(labels)), captions, torch.tensor(places))


def flow_caption(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    """A caption, and whether it says where things are; a share is left out for guidance."""
    lot = rng.random()
    if lot < EMPTY_SHARE:
        return "", False
    if lot < EMPTY_SHARE + GENERAL_SHARE:
        return "shapes", False
    vague = rng.random() < VAGUE_SHARE
    return decorate(caption(scene, rng, vague=vague), rng), not vague


def sample_times(count: int, generator: torch.Generator) -> torch.Tensor:
    """Logit-normal with a uniform share, shifted towards noise, and a share of almost pure noise.

    Only there does nothing but the caption say which object goes where: with few such samples the
    model draws fine shapes long before it reads the relation.
    """
    middle = torch.randn(count, generator=generator).sigmoid()
    uniform = torch.rand(count, generator=generator)
    lot = torch.rand(count, generator=generator)
    time = torch.where(lot < UNIFORM_SHARE, uniform, middle)
    time = SHIFT * time / (1 + (SHIFT - 1) * time)
    high = HIGH_NOISE + (1 - HIGH_NOISE) * uniform
    return torch.where(lot > 1 - HIGH_NOISE_SHARE, high, time)


def class_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in which the many background cells do not drown the objects."""
    weight = torch.ones(CLASSES)
    weight[-len(BACKGROUNDS) :] = BACKGROUND_WEIGHT
    return functional.cross_entropy(logits.float().flatten(0, 2), labels.flatten(), weight)


def t5_length(rng: random.Random) -> int:
    """A random padded length, often the pipeline's default."""
    full = rng.random() < FULL_LENGTH_SHARE
    return T5_FULL_LENGTH if full else rng.randint(SHORTEST, LONGEST)


def noisy(
    latents: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mixed latents, their times, and the velocity to learn."""
    time = sample_times(len(latents), generator)
    noise = torch.randn(latents.shape, generator=generator)
    share = time[:, None, None, None]
    return (1 - share) * latents + share * noise, time, noise - latents


def make_optimizers(net: FlowNet, plan: FlowPlan) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (not the adaLN ones, which start at 0), AdamW for the rest."""
    blocks = net.transformer.transformer_blocks.named_parameters()
    matrices = [p for name, p in blocks if p.ndim == 2 and ".linear." not in name]
    taken = {id(p) for p in matrices}
    rest = [p for p in net.parameters() if id(p) not in taken]
    adam = torch.optim.AdamW(rest, lr=plan.adam_rate, betas=(0.9, 0.95), weight_decay=0.01)
    return [adam, SharedMuon(matrices, plan.muon_rate, 0.01)]


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Mean over the processes, in one message."""
    if not dist.is_initialized():
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(
        parameters, flat.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.grad = part.view_as(parameter)


class Ema:
    """A slow copy of the weights: what is sampled from and shipped."""

    def __init__(self, net: nn.Module) -> None:
        self.state = {key: value.clone() for key, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Move towards the weights; faster in the first steps."""
        decay = min(EMA_DECAY, (1 + step) / (20 + step))
        for key, value in net.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - decay)


class FlowTrainer:
    """One process of the training."""

    def __init__(self, plan: FlowPlan, rank: int) -> None:
        self.plan, self.rank = plan, rank
        torch.manual_seed(plan.seed)
        self.code = LatentCode.at(plan.work / "latent_code.pt")
        self.net = FlowNet(plan.work)
        self.optimizers = make_optimizers(self.net, plan)
        self.rates = [group["lr"] for opt in self.optimizers for group in opt.param_groups]
        self.parameters = list(self.net.parameters())
        state = load_checkpoint(plan.checkpoint)
        start = None if state or not plan.start else load_checkpoint(plan.start)
        if state:
            self.net.load_state_dict(state["model"])
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
        elif start:
            self.net.load_state_dict(start["ema"])
        elif reading := load_checkpoint(plan.work / "reading.pt"):
            self.net.text.load_state_dict(reading["text"])
            self.net.reader.load_state_dict(reading["reader"])
        set_positions(self.net.transformer, plan.pixels)
        self.ema = Ema(self.net)
        if state:
            self.ema.state = state["ema"]
        self.step = state["step"] if state else 0
        self.budget = Budget(plan.minutes, state["spent"] if state else 0.0)
        self.resumed = state is not None

    def run(self) -> None:
        """Train until the time is used up."""
        name = f"flow{self.plan.pixels}"
        log = None
        if self.rank == 0:
            log = CurveLog(self.plan.work / "logs" / f"{name}.csv", name, append=self.resumed)
        averages = Averages()
        while (progress := self._shared_progress()) < 1:
            averages.add(**self._train_step(progress))
            self.step += 1
            self.ema.update(self.net, self.step)
            if log and (self.step % 25 == 0 or self.step <= 3):
                log.write(self.budget, step=self.step, **averages.take())
            if log and self.step % 150 == 0:
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
        warm = min(1, (self.step + 1) / 60)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            set_rate([optimizer], rate * warm * flat_then_linear(progress))
        # Seeds from the step: a restart draws new scenes and no process sees another's.
        seed = (self.plan.seed * 1_000_003 + self.step) * 64 + self.rank
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        batch = make_batch(rng, self.code, self.plan.batch, self.plan.pixels)
        mixed, time, target = noisy(batch.latents, generator)
        tokens = self.net.text.tokenize(batch.captions, t5_length(rng))
        with torch.autocast("cpu", torch.bfloat16):
            context = self.net.text(tokens, generator)
            velocity = self.net.velocity(mixed, time, context)
            logits = self.net.class_logits(mixed.shape[-1])
            read = self.net.reader.loss(context.tokens, batch.places)
        mse = functional.mse_loss(velocity.float(), target)
        named = class_loss(logits, batch.labels)
        self.net.zero_grad(set_to_none=True)
        (mse + AUX_WEIGHT * named + READING_WEIGHT * read).backward()
        average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        losses = {"mse": mse, "class_loss": named, "reading_loss": read, "gradient_norm": norm}
        return {name: loss.item() for name, loss in losses.items()}

    def save(self) -> None:
        """Keep everything a restart needs."""
        save_checkpoint(
            self.plan.checkpoint,
            model=self.net.state_dict(),
            ema=self.ema.state,
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            step=self.step,
            spent=self.budget.elapsed,
        )


def _work(rank: int, plan: FlowPlan) -> None:
    # More threads than cores spin at barriers: one thread a process, one process a core.
    torch.set_num_threads(1)
    meeting = plan.work / "meeting"
    if plan.processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting.resolve()}", rank=rank, world_size=plan.processes
        )
    FlowTrainer(plan, rank).run()
    if plan.processes > 1:
        dist.destroy_process_group()


def train_flow(plan: FlowPlan) -> None:
    """Train in `plan.processes` processes; a second call continues where the first ended."""
    (plan.work / "meeting").unlink(missing_ok=True)
    # Files that every process reads: once, before they race for them.
    LatentCode.at(plan.work / "latent_code.pt")
    tokenizers(plan.work / "tokenizers")
    if plan.processes == 1:
        _work(0, plan)
    else:
        torch.multiprocessing.spawn(_work, (plan,), nprocs=plan.processes)
