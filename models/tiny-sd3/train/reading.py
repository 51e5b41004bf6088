# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Teach the text encoders who stands where, before and while the transformer learns to draw.

The velocity says little about word order: a noisy picture already shows which object is on top, so
that the transformer can leave the relation unread for thousands of steps. This head has nothing
but the caption's tokens, and must name what is at each of nine places. It is thrown away later.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from train.common import (
    Averages,
    Budget,
    CurveLog,
    flat_then_linear,
    load_checkpoint,
    save_checkpoint,
    set_rate,
)
from train.text import CONTEXT_WIDTH, TextEncoders, decorate
from train.world import COLORS, PLACES, RELATIONS, SHAPES, Scene, caption, is_held_out, sample_scene

NOTHING = len(COLORS) * len(SHAPES)
UNKNOWN = -100  # what cross_entropy leaves out
PLACE_INDEX = {position: index for index, position in enumerate(PLACES.values())}
HEADS = 4
BATCH = 64


def place_labels(scene: Scene) -> list[int]:
    """The object at each place, or nothing."""
    labels = [NOTHING] * len(PLACES)
    pair = scene.where in RELATIONS
    positions = RELATIONS[scene.where] if pair else (PLACES[scene.where],)
    for thing, position in zip(scene.things, positions, strict=True):
        labels[PLACE_INDEX[position]] = thing.label
    return labels


class PlaceReader(nn.Module):
    """One question a place, asked of the context's tokens by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = nn.Parameter(torch.randn(len(PLACES), CONTEXT_WIDTH))
        self.norm = nn.LayerNorm(CONTEXT_WIDTH)
        self.key = nn.Linear(CONTEXT_WIDTH, CONTEXT_WIDTH)
        self.value = nn.Linear(CONTEXT_WIDTH, CONTEXT_WIDTH)
        self.answer = nn.Sequential(
            nn.Linear(CONTEXT_WIDTH, CONTEXT_WIDTH),
            nn.GELU(),
            nn.Linear(CONTEXT_WIDTH, NOTHING + 1),
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Class logits, (n, places, classes)."""
        read = self.norm(tokens)
        keys, values = (
            layer(read).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.key, self.value)
        )
        asked = self.questions.unflatten(-1, (HEADS, -1)).transpose(0, 1)
        weights = (asked @ keys.mT * keys.shape[-1] ** -0.5).softmax(-1)
        return self.answer((weights @ values).transpose(1, 2).flatten(2))

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean over the captions that say where; labels of the others are UNKNOWN."""
        logits = self(tokens).float().flatten(0, 1)
        total = functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        return total / (labels != UNKNOWN).sum().clamp(min=1)


@dataclass(frozen=True)
class ReadingPlan:
    """How long, and where."""

    work: Path
    minutes: float
    rate: float = 1e-3
    seed: int = 0

    @property
    def checkpoint(self) -> Path:
        """Where the state is kept."""
        return self.work / "reading.pt"


class ReadingTrainer:
    """Trains the text encoders and the reader alone: captions cost next to nothing."""

    def __init__(self, plan: ReadingPlan) -> None:
        self.plan = plan
        torch.manual_seed(plan.seed)
        self.text, self.reader = TextEncoders(plan.work / "tokenizers"), PlaceReader()
        for clip in (self.text.clip_1, self.text.clip_2):
            clip.set_attn_implementation("eager")
        self.parameters = [*self.text.parameters(), *self.reader.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        state = load_checkpoint(plan.checkpoint)
        if state:
            self.text.load_state_dict(state["text"])
            self.reader.load_state_dict(state["reader"])
            if "optimizer" in state:
                self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"] if state else 0
        self.budget = Budget(plan.minutes, state["spent"] if state else 0.0)
        self.log = CurveLog(plan.work / "logs" / "reading.csv", "reading", append=bool(state))

    def run(self) -> None:
        """Train until the time is used up."""
        averages = Averages()
        while self.budget.progress < 1:
            rate = self.plan.rate * flat_then_linear(self.budget.progress)
            set_rate([self.optimizer], rate * min(1, (self.step + 1) / 50))
            averages.add(loss=self._train_step())
            self.step += 1
            if self.step % 50 == 0:
                self.log.write(self.budget, step=self.step, **averages.take())
            if self.step % 200 == 0:
                self.save()
        self.save()

    def _train_step(self) -> float:
        seed = (self.plan.seed * 1_000_003 + self.step) * 64 + 62
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        scenes = [sample_scene(rng, 0.8) for _ in range(BATCH)]
        scenes = [scene for scene in scenes if not is_held_out(scene)]
        captions = [decorate(caption(scene, rng), rng) for scene in scenes]
        labels = torch.tensor([place_labels(scene) for scene in scenes])
        length = 256 if rng.random() < 0.05 else rng.randint(24, 64)
        context = self.text(self.text.tokenize(captions, length), generator)
        loss = self.reader.loss(context.tokens, labels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.item()

    def save(self) -> None:
        """Keep everything a restart needs."""
        save_checkpoint(
            self.plan.checkpoint,
            text=self.text.state_dict(),
            reader=self.reader.state_dict(),
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            spent=self.budget.elapsed,
        )


def train_reading(plan: ReadingPlan) -> None:
    """Train the text encoders; a second call continues where the first ended."""
    torch.set_num_threads(1)
    ReadingTrainer(plan).run()
