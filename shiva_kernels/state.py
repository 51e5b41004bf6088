# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What is known during one call of the transformer. Nothing of it ever lies on a module.

A *request* says how it is pruned: budget, sigma grid, guidance. Entering one of its steps (or the
whole of its loop) makes a *scope*, which remembers what the step's first call selected. A call of
the transformer runs in a *mode*: pruned, training, or observed. Scope and mode are held in context
variables, so that requests interleave on one transformer, in threads and in coroutines, and two
transformers do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch

from shiva_kernels.config import Guidance, OnKeep, PairScore
from shiva_kernels.errors import ShivaError
from shiva_kernels.estimators import Surrogate

if TYPE_CHECKING:
    from shiva_kernels.apply import ShivaHandle


@dataclass(frozen=True)
class Conditions:
    """What the router sees besides tokens: time embedding (B, T), pooled text (B, P)."""

    time: torch.Tensor
    pooled: torch.Tensor


# (block, x (B, N, D), conditions) -> scores (B, N): takes the router's place, for comparisons.
Scorer: TypeAlias = Callable[[int, torch.Tensor, Conditions], torch.Tensor]


@dataclass(frozen=True)
class PruningRequest:
    """How the calls of one request are pruned. Made by `ShivaHandle.request`; holds no state.

    budget: a shipped one, or None for all tokens.
    sigmas: the request's *full* grid, also where it runs only a part of it (image-to-image,
        resumed). None: the pipeline's of the config, else the artifact's.
    """

    handle: ShivaHandle
    budget: float | None
    sigmas: tuple[float, ...] | None = None
    guidance: Guidance | None = None
    pair_score: PairScore = PairScore.MAXIMUM
    on_keep: OnKeep | None = None
    scorer: Scorer | None = None

    @contextmanager
    def step(self, sigma: float) -> Iterator[None]:
        """All calls of one denoising step, of noise level `sigma`: the first selects."""
        with _entered(Scope(self.handle, (self,), (sigma,))):
            yield

    @contextmanager
    def steps(self) -> Iterator[None]:
        """A whole sampling loop, such as a pipeline's: a new sigma begins a new step."""
        with _entered(Scope(self.handle, (self,), None)):
            yield

    def row(self, sigma: float, tokens: int) -> tuple[int, ...] | None:
        """k of each block at `sigma`; None where nothing is pruned. Equal rows may share a call."""
        if self.budget is None:
            return None
        return self.handle.table(self.budget, self.sigmas, tokens).row(sigma)


@dataclass
class Scope:
    """A step, or a loop of them, of one request or of several that share its calls."""

    handle: ShivaHandle
    requests: tuple[PruningRequest, ...]
    sigmas: tuple[float, ...] | None  # of each request; None: read off each call
    selected_at: float | None = None
    selected: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])

    def begin_call(self, sigma: float) -> None:
        """Forgets what another step selected."""
        if self.selected_at != sigma:
            self.selected_at = sigma
            self.selected.clear()


@dataclass(frozen=True)
class TrainingPlan:
    """What a training step asks of one micro-batch: one timestep, hence one k a block.

    k: tokens to keep in blocks 1, 2, …; entry i is of block i + 1.
    ratios: the same, as the continuous ratios (blocks - 1,) that carry the policy's gradient; None
        where the policy does not train.
    surrogate: how gradients reach scores and ratios; None for none (hard top-k alone).
    noise: deviation of the Gaussian noise on the standardised scores; the noisy scores decide both
        the top-k and the soft rank.
    generator: of that noise.
    teacher_delta: f(x) = y - x of the teacher by block, (B, N, D): for Estimator.BENEFIT.
    outputs: blocks whose output to record, by index over all blocks.
    scorer: in place of the router.
    mixed: by block, two k and how far (a tensor in [0, 1], with gradient) from the first to the
        second: the block runs at both and its outputs are mixed. Takes the place of its `k`.
    """

    k: Sequence[int]
    ratios: torch.Tensor | None = None
    surrogate: Surrogate | None = None
    noise: float = 0.0
    generator: torch.Generator | None = None
    teacher_delta: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    outputs: frozenset[int] = frozenset()
    scorer: Scorer | None = None
    mixed: dict[int, tuple[int, int, torch.Tensor]] = field(
        default_factory=dict[int, tuple[int, int, torch.Tensor]]
    )


@dataclass(frozen=True)
class BlockRecord:
    """One pruned block of a training step; scores, pi and kept are (B, N)."""

    k: int
    scores: torch.Tensor  # standardised, without noise
    noisy: torch.Tensor
    kept: torch.Tensor  # bool
    pi: torch.Tensor | None  # soft selection, with gradient; None without a surrogate


@dataclass
class Record:
    """What a training or observed call leaves behind, by block over all blocks."""

    blocks: dict[int, BlockRecord] = field(default_factory=dict[int, BlockRecord])
    outputs: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    deltas: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])


@dataclass(frozen=True)
class Training:
    handle: ShivaHandle
    plan: TrainingPlan
    record: Record


@dataclass(frozen=True)
class Observation:
    """A call with all tokens that records outputs and y - x of the named blocks."""

    handle: ShivaHandle
    outputs: frozenset[int]
    deltas: frozenset[int]
    record: Record


Entered: TypeAlias = Scope | Training | Observation
_ENTERED: ContextVar[tuple[Entered, ...]] = ContextVar("shiva_entered", default=())


@contextmanager
def _entered(what: Entered) -> Iterator[None]:
    token = _ENTERED.set((*_ENTERED.get(), what))
    try:
        yield
    finally:
        _ENTERED.reset(token)


def entered_of(handle: ShivaHandle) -> Entered | None:
    """The innermost that was entered for this transformer."""
    return next((e for e in reversed(_ENTERED.get()) if e.handle is handle), None)


@contextmanager
def together(members: Sequence[tuple[PruningRequest, float]]) -> Iterator[None]:
    """One call for several requests, each at its own sigma; see `ShivaHandle.together`."""
    first = members[0][0]
    for request, _ in members[1:]:
        same = (request.handle, request.guidance, request.pair_score, request.scorer)
        if same != (first.handle, first.guidance, first.pair_score, first.scorer):
            raise ShivaError("requests that share a call must agree in transformer and guidance")
    requests = tuple(request for request, _ in members)
    with _entered(Scope(first.handle, requests, tuple(sigma for _, sigma in members))):
        yield


@contextmanager
def training(handle: ShivaHandle, plan: TrainingPlan) -> Iterator[Record]:
    record = Record()
    with _entered(Training(handle, plan, record)):
        yield record


@contextmanager
def observation(
    handle: ShivaHandle, outputs: frozenset[int], deltas: frozenset[int]
) -> Iterator[Record]:
    record = Record()
    with _entered(Observation(handle, outputs, deltas, record)):
        yield record
