# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The transformer as training sees it: student and teacher in one set of weights.

The teacher is the same module with its adapter off and nothing pruned: no second copy is held. The
adapter is a DoRA on every linear layer of attention and feed-forward; it stays off, and costs
nothing, until the joint stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from shiva_kernels.apply import ShivaHandle
from shiva_kernels.backbones.base import blocks_of
from shiva_kernels.config import Guidance, PairScore
from shiva_kernels.errors import ShivaError
from shiva_kernels.estimators import Surrogate
from shiva_kernels.policy import RatioPolicy
from shiva_kernels.selection import scores_of_images, standardise
from shiva_kernels.state import Conditions, Scorer, TrainingPlan
from shiva_kernels.training.bins import BinnedRatios, bracketing
from shiva_kernels.training.config import Ratios, Scores, TrainConfig
from shiva_kernels.training.data import Batch

ADAPTER = "shiva"


@dataclass(frozen=True)
class Pruning:
    """How one forward prunes.

    ratios: [prunable blocks]; gradients reach them through `surrogate`.
    deltas: what the dense teacher's blocks add, for scores or estimators that look at it.
    guidance: NONE for rows that are samples of their own, PAIR for both branches in one batch.
    """

    ratios: Tensor
    surrogate: Surrogate | None = None
    noise: float = 0.0
    generator: torch.Generator | None = None
    deltas: dict[int, Tensor] | None = None
    guidance: Guidance = Guidance.NONE


@dataclass(frozen=True)
class Observation:
    """What a forward gave: velocity [B, C, h, w], features [B, N, D] of some blocks, and, of a
    teacher that was asked for them, what each block added to each token."""

    velocity: Tensor
    features: tuple[Tensor, ...] = ()
    deltas: dict[int, Tensor] | None = None


class Student:
    """A transformer with `apply_shiva`'s hooks on it, its router, its policy, its adapter."""

    def __init__(
        self, handle: ShivaHandle, policy: RatioPolicy | BinnedRatios, config: TrainConfig
    ) -> None:
        self.handle, self.policy, self.config = handle, policy, config
        self.transformer, self.router = handle.transformer, handle.router
        self.transformer.requires_grad_(False)
        self.prunable = handle.block_count - 1
        self.adapting = False
        if config.steps.joint and not _tuner_layers(self.transformer):
            add_adapter(self.transformer, config.rank, config.seed)
        self.router.to(self.device)
        self.policy.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self.transformer.config.in_channels

    @property
    def needs_deltas(self) -> bool:
        """Whether scores come from the teacher's blocks."""
        return self.config.arm.scores is Scores.TEACHER_NORM

    # ------------------------------------------------------------ parameters

    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name."""
        return {
            name: parameter
            for name, parameter in self.transformer.named_parameters()
            if f".{ADAPTER}." in name
        }

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """What the arm trains, by the name of its learning rate."""
        arm, groups = self.config.arm, {}
        if arm.learns_scores:
            groups["router"] = list(self.router.parameters())
        if arm.ratios.learn:
            groups["policy"] = list(self.policy.parameters())
        if self.config.steps.joint:
            groups["adapter"] = list(self.adapter().values())
        return groups

    def state(self) -> dict[str, Any]:
        """All that training changes."""
        return {
            "router": self.router.state_dict(),
            "policy": self.policy.state_dict(),
            "adapter": {name: p.detach() for name, p in self.adapter().items()},
            "adapting": self.adapting,
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Put `state()` back.

        Raises:
            ShivaError: the adapter is not of this transformer or of another rank.
        """
        self.router.load_state_dict(state["router"])
        self.policy.load_state_dict(state["policy"])
        mine = self.adapter()
        if mine.keys() != state["adapter"].keys():
            raise ShivaError("the checkpoint's adapter is of another transformer or configuration")
        for name, parameter in mine.items():
            parameter.copy_(state["adapter"][name])
        self.adapting = state["adapting"]

    # ------------------------------------------------------------ forwards

    @torch.no_grad()
    def teacher(
        self, mixed: Tensor, sigma: Tensor, batch: Batch, *, every: int = 0, deltas: bool = False
    ) -> Observation:
        """The dense backbone as it was before training."""
        blocks = range(1, self.handle.block_count) if deltas else ()
        with adapter_switched(self.transformer, on=False):
            return self._dense(mixed, sigma, batch, every, tuple(blocks))

    def observe(
        self, mixed: Tensor, sigma: Tensor, batch: Batch, pruning: Pruning | None, *, every: int = 0
    ) -> Observation:
        """The student: with its adapter where that is on, and pruned where it is told how."""
        with adapter_switched(self.transformer, on=self.adapting):
            if pruning is None:
                return self._dense(mixed, sigma, batch, every, ())
            plan = self._plan(mixed, pruning, every)
            with self.handle.training(plan) as record:
                velocity = self._velocity(mixed, sigma, batch)
            return Observation(velocity, tuple(record.outputs[i] for i in sorted(plan.outputs)))

    def _dense(
        self, mixed: Tensor, sigma: Tensor, batch: Batch, every: int, deltas: tuple[int, ...]
    ) -> Observation:
        outputs = self._compared(every)
        with self.handle.observe(outputs=sorted(outputs), deltas=deltas) as record:
            velocity = self._velocity(mixed, sigma, batch)
        features = tuple(record.outputs[i] for i in sorted(outputs))
        return Observation(velocity, features, record.deltas if deltas else None)

    def _velocity(self, mixed: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        return self.transformer(
            hidden_states=mixed,
            timestep=(1000 * sigma).expand(len(mixed)),
            encoder_hidden_states=batch.context,
            pooled_projections=batch.pooled,
            return_dict=False,
        )[0]

    def _compared(self, every: int) -> frozenset[int]:
        """After every `every`-th block; none for 0."""
        return frozenset(range(every - 1, self.handle.block_count, every)) if every else frozenset()

    def _plan(self, mixed: Tensor, pruning: Pruning, every: int) -> TrainingPlan:
        tokens = self._tokens(mixed)
        ratios = pruning.ratios
        k = [min(max(int(tokens * float(r) + 1e-4), 1), tokens) for r in ratios.detach()]
        return TrainingPlan(
            k=k,
            ratios=ratios,
            surrogate=pruning.surrogate,
            noise=pruning.noise,
            generator=pruning.generator,
            teacher_delta=pruning.deltas or {},
            outputs=self._compared(every),
            scorer=self._scorer(pruning),
            mixed=self._mixed(ratios, tokens) if pruning.surrogate is not None else {},
        )

    def _mixed(self, ratios: Tensor, tokens: int) -> dict[int, tuple[int, int, Tensor]]:
        """Of an arm whose ratios lie between bins, while it learns."""
        if self.config.arm.ratios is not Ratios.BINS:
            return {}
        found: dict[int, tuple[int, int, Tensor]] = {}
        for block, ratio in enumerate(ratios, start=1):
            low, high, share = bracketing(ratio)
            found[block] = (max(int(tokens * low), 1), int(tokens * high + 1e-4), share)
        return found

    def _tokens(self, mixed: Tensor) -> int:
        patch = self.transformer.config.patch_size
        return (mixed.shape[-2] // patch) * (mixed.shape[-1] // patch)

    def _scorer(self, pruning: Pruning) -> Scorer:
        base = self._base_scorer(pruning)
        if pruning.guidance is not Guidance.PAIR:
            return base

        def paired(block: int, x: Tensor, conditions: Conditions) -> Tensor:
            scores = standardise(base(block, x, conditions))
            return scores_of_images(scores, Guidance.PAIR, PairScore.MAXIMUM).repeat(2, 1)

        return paired

    def _base_scorer(self, pruning: Pruning) -> Scorer:
        match self.config.arm.scores:
            case Scores.ROUTER:
                return self.handle.score
            case Scores.RANDOM:
                return lambda block, x, conditions: torch.rand(
                    x.shape[:2], generator=pruning.generator
                ).to(x.device)
            case Scores.TEACHER_NORM:
                deltas = pruning.deltas
                if deltas is None:
                    raise ShivaError("teacher-norm scores need the teacher's deltas of this call")
                return lambda block, x, conditions: deltas[block].float().norm(dim=-1)


def add_adapter(transformer: Any, rank: int, seed: int) -> None:
    """A DoRA on every linear layer of the blocks' attention and feed-forward (not of adaLN)."""
    targets = [
        f"{block_name}.{name}"
        for block_name, block in blocks_of(transformer)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and "norm" not in name
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, use_dora=True, target_modules=targets),
            adapter_name=ADAPTER,
        )


def _tuner_layers(transformer: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapter_switched(transformer: nn.Module, *, on: bool) -> Iterator[None]:
    """The adapter on or off within; peft's own switch also changes what is trainable."""
    layers = _tuner_layers(transformer)
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = not on
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was
