# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The training loop: three stages, one timestep to a micro-batch, resumable to the bit.

Every random draw is a function of (seed, step, micro-batch, process), so that a restart goes on
with what it would have drawn. The policy runs once a step, for all micro-batches: their gradients
meet in a leaf, and one backward pass takes them and the budget's loss through it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from shiva_kernels.errors import ShivaError
from shiva_kernels.estimators import Estimator, Surrogate
from shiva_kernels.policy import BudgetLoss, RatioPolicy
from shiva_kernels.training.bins import BinnedRatios
from shiva_kernels.training.config import Annealed, Ratios, Stage, TrainConfig
from shiva_kernels.training.data import Batch, Source
from shiva_kernels.training.logs import CsvLog, Means, progress_bar
from shiva_kernels.training.losses import normalized_distance
from shiva_kernels.training.sampling import micro_seed, step_strata
from shiva_kernels.training.student import Observation, Pruning, Student

LOG_EVERY, SAVE_EVERY = 10, 50


@dataclass(frozen=True)
class Moment:
    """Where in the training a step is."""

    step: int
    stage: Stage
    within: int
    length: int

    def rate(self, config: TrainConfig) -> float:
        """The share of the learning rates: a linear warm-up in each stage, then flat, then down."""
        warm = min(1.0, (self.within + 1) / config.warmup) if config.warmup else 1.0
        left = (self.length - self.within) / self.length
        return warm * (min(1.0, left / config.decay) if config.decay else 1.0)


class Trainer:
    """Trains a student in `folder`; `run` goes on from the last checkpoint there."""

    def __init__(
        self,
        config: TrainConfig,
        student: Student,
        source: Source,
        folder: Path,
        *,
        shift: float = 1.0,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.config, self.student, self.source, self.folder = config, student, source, folder
        self.shift = shift
        self.accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        world = self.accelerator.num_processes
        if config.micro_batches % world:
            raise ShivaError(
                f"micro_batches: {config.micro_batches} strata do not divide by {world} processes"
            )
        self.budget = BudgetLoss(config.target, config.weights.budget).to(student.device)
        self.groups = student.trainable()
        self.optimizer = torch.optim.AdamW(
            [{"params": list(group), "name": name} for name, group in self.groups.items()]
            or [{"params": [nn.Parameter(torch.zeros(()))], "name": "none"}],
            betas=(0.9, 0.99),
            weight_decay=0.0,
        )
        self.step = 0
        self._restore()

    @property
    def checkpoint(self) -> Path:
        """Where the state is kept."""
        return self.folder / "checkpoint.pt"

    def run(self, until: int | None = None) -> None:
        """Train to the end, or to the optimiser step `until`."""
        total = self.config.steps.total
        until = total if until is None else min(until, total)
        if self.step >= until:
            return
        log = CsvLog(self.folder / "log.csv", after_step=self.step)
        means, main = Means(), self.accelerator.is_main_process
        with progress_bar(self.folder.name, total, self.step, shown=main) as bar:
            while self.step < until:
                stage, within, length = self.config.steps.at(self.step)
                means.add(self._optimizer_step(Moment(self.step, stage, within, length)))
                self.step += 1
                bar.advance(stage.value)
                if main and (self.step % LOG_EVERY == 0 or self.step == until):
                    self._write(log, stage, means.take())
                if main and (self.step % SAVE_EVERY == 0 or self.step == until):
                    self.save()

    def _write(self, log: CsvLog, stage: Stage, values: dict[str, float]) -> None:
        log.write(self.step, values, stage=stage.value)
        if self.accelerator.trackers:
            self.accelerator.log(values, step=self.step)

    # ------------------------------------------------------------ a step

    def _optimizer_step(self, moment: Moment) -> dict[str, float]:
        config, world = self.config, self.accelerator.num_processes
        self._set_stage(moment)
        strata = step_strata(
            config.seed, moment.step, config.micro_batches, self.shift, config.ratio_range
        ).of_rank(self.accelerator.process_index, world)
        sigmas = torch.tensor(strata.sigmas, dtype=torch.float32, device=self.student.device)
        ratios = self._ratios(moment, sigmas, torch.tensor(strata.ratios, dtype=torch.float32))
        leaf = ratios.detach().requires_grad_(ratios.requires_grad)
        self.optimizer.zero_grad(set_to_none=True)
        if not any(p.requires_grad for group in self.groups.values() for p in group):
            return {"keep_ratio": float(leaf.detach().mean())}  # nothing of this arm learns yet
        means = Means()
        for micro, sigma in enumerate(sigmas):
            means.add(self._micro_step(moment, micro, sigma, leaf[micro]))
        values = means.take() | self._policy_backward(moment, ratios, leaf)
        norm = self._apply_gradients()
        return values | {"gradient_norm": norm, "keep_ratio": float(leaf.detach().mean())}

    def _micro_step(
        self, moment: Moment, micro: int, sigma: Tensor, ratios: Tensor
    ) -> dict[str, float]:
        config, accelerator = self.config, self.accelerator
        seed = micro_seed(config.seed, moment.step, micro, accelerator.process_index)
        batch = self.source.batch(seed, config.micro_batch, config.caption_dropout)
        batch = batch.to(self.student.device)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(batch.latents.shape, generator=generator).to(self.student.device)
        mixed = (1 - sigma) * batch.latents + sigma * noise
        with accelerator.autocast():
            teacher = self._teacher(mixed, sigma, batch)
            pruning = self._pruning(moment, ratios, generator, teacher)
            mine = self.student.observe(mixed, sigma, batch, pruning, every=config.distill_every)
        losses = self._losses(mine, teacher, noise - batch.latents)
        loss = torch.stack(list(losses.values())).sum()
        if loss.requires_grad:
            accelerator.backward(loss / len(range(0, config.micro_batches, self._world)))
        return {name: value.item() for name, value in losses.items()}

    @property
    def _world(self) -> int:
        return self.accelerator.num_processes

    def _losses(
        self, mine: Observation, teacher: Observation | None, target: Tensor
    ) -> dict[str, Tensor]:
        weights = self.config.weights
        losses = {"diffusion": functional.mse_loss(mine.velocity.float(), target)}
        if teacher is not None and weights.distillation:
            distance = normalized_distance(mine.features, teacher.features)
            losses["distillation"] = weights.distillation * distance
        if teacher is not None and weights.output:
            distance = functional.mse_loss(mine.velocity.float(), teacher.velocity.float())
            losses["output"] = weights.output * distance
        return losses

    def _teacher(self, mixed: Tensor, sigma: Tensor, batch: Batch) -> Observation | None:
        weights, arm = self.config.weights, self.config.arm
        deltas = self.student.needs_deltas or arm.estimator is Estimator.BENEFIT
        if not (weights.distillation or weights.output or (arm.prunes and deltas)):
            return None
        every = self.config.distill_every
        return self.student.teacher(mixed, sigma, batch, every=every, deltas=arm.prunes and deltas)

    def _pruning(
        self,
        moment: Moment,
        ratios: Tensor,
        generator: torch.Generator,
        teacher: Observation | None,
    ) -> Pruning | None:
        config = self.config
        if not config.arm.prunes:
            return None
        done = moment.step / max(config.steps.total, 1)
        surrogate = None
        if config.arm.estimator is not None:
            tau_rank, tau_sel = annealed(config.tau_rank, done), annealed(config.tau_sel, done)
            surrogate = Surrogate(config.arm.estimator, tau_rank, tau_sel)
        deltas = teacher.deltas if teacher is not None else None
        return Pruning(ratios, surrogate, config.score_noise, generator, deltas)

    # ------------------------------------------------------------ ratios and the policy

    def _ratios(self, moment: Moment, sigmas: Tensor, warm: Tensor) -> Tensor:
        """Keep ratios [micro-batches, prunable blocks]."""
        config, shape = self.config, (len(sigmas), self.student.prunable)
        if not config.arm.prunes:
            return torch.ones(shape)
        if moment.stage is Stage.ROUTER:
            return warm[:, None].expand(shape).contiguous()
        if config.arm.ratios is Ratios.FIXED:
            return torch.full(shape, config.target)
        logits = self.student.policy.logits(sigmas)
        if moment.stage is Stage.POLICY and config.arm.ratios is Ratios.POLICY:
            seed = micro_seed(config.seed, moment.step, 1 << 20, self.accelerator.process_index)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(logits.shape, generator=generator).to(logits.device)
            logits = logits + config.logit_noise * noise
        return torch.sigmoid(logits)

    def _policy_backward(self, moment: Moment, ratios: Tensor, leaf: Tensor) -> dict[str, float]:
        if moment.stage is Stage.ROUTER or not ratios.requires_grad:
            return {}
        policy = self.student.policy
        if isinstance(policy, BinnedRatios):
            loss = policy.loss(ratios, self.config.weights.budget)
        else:
            loss = self.budget(ratios)
        gathered = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        # The micro-batches' losses came divided by their number already.
        torch.autograd.backward([ratios, loss], [gathered, torch.ones_like(loss)])
        mean = self.budget.mu if isinstance(policy, RatioPolicy) else ratios.detach().mean()
        return {"budget": float(loss.detach()), "budget_mean": float(mean)}

    # ------------------------------------------------------------ the optimiser

    def _set_stage(self, moment: Moment) -> None:
        config, joint = self.config, moment.stage is Stage.JOINT
        self.student.adapting = joint
        learns = {
            "router": moment.stage is not Stage.POLICY or config.router_in_policy,
            "policy": moment.stage is not Stage.ROUTER,
            "adapter": joint,
        }
        for group in self.optimizer.param_groups:
            name = group["name"]
            group["lr"] = moment.rate(config) * getattr(config.rates, name, 0.0)
            for parameter in self.groups.get(name, ()):
                parameter.requires_grad_(learns[name])

    def _apply_gradients(self) -> float:
        parameters = [p for group in self.groups.values() for p in group if p.grad is not None]
        if not parameters:
            return 0.0
        if self._world > 1:
            for parameter in parameters:
                mean: Any = self.accelerator.reduce(parameter.grad, reduction="mean")
                parameter.grad = mean
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip)
        if math.isfinite(float(norm)):  # one bad micro-batch must not end a run of days
            self.optimizer.step()
        return float(norm)

    # ------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Keep everything a restart needs; a kill while writing leaves the old file whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "key": self.config.key(),
            "step": self.step,
            "parts": self.student.state(),
            "optimizer": self.optimizer.state_dict(),
            "budget": self.budget.state_dict(),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def _restore(self) -> None:
        if not self.checkpoint.exists():
            return
        state: dict[str, Any] = torch.load(
            self.checkpoint, map_location=self.student.device, weights_only=True
        )
        if state["key"] != self.config.key():
            raise ShivaError(
                f"{self.checkpoint}: made by another config ({state['key']}, this one is "
                f"{self.config.key()}); take another folder, or remove that one"
            )
        self.student.load_state(state["parts"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.budget.load_state_dict(state["budget"])
        self.step = state["step"]


def annealed(temperature: Annealed, done: float) -> float:
    """A temperature at a share of the training: half a cosine from start to end."""
    share = (1 - math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
    return temperature.start + (temperature.end - temperature.start) * share


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers."""
    return sum(parameter.numel() for parameter in parameters)
