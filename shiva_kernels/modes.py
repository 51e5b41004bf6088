# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a block does with its tokens: the three ways in which a call of the transformer runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata

from shiva_kernels.backbones import Backbone
from shiva_kernels.backbones.base import Arguments
from shiva_kernels.config import Guidance, KeepMap, PairScore
from shiva_kernels.errors import ShivaError, Unsupported
from shiva_kernels.estimators import gate_input, gate_output, soft_selection
from shiva_kernels.ops import gather_tokens, scatter_tokens
from shiva_kernels.selection import kept_mask, scores_of_images, standardise, top_k
from shiva_kernels.state import BlockRecord, Conditions, Observation, Scope, Scorer, TrainingPlan


class BlockCall:
    """One block, about to run on x (B, N, D)."""

    def __init__(
        self,
        index: int,
        backbone: Backbone,
        metadata: TransformerBlockMetadata,
        forward: Callable[..., Any],
        arguments: Arguments,
    ) -> None:
        self.index = index
        self._backbone, self._metadata = backbone, metadata
        self._forward, self._arguments = forward, arguments
        self.x: torch.Tensor = arguments[metadata.hidden_states_argument_name]

    def dense(self) -> Any:
        """The block on all tokens: its own output, untouched."""
        return self._forward(**self._arguments)

    def on(self, x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The block on the rows of x (B, N, D) at `index` (images, k), put back into x.

        Row b of the batch is of image b mod images. Returns (B, N, D) and the block's raw output.
        """
        rows = index.repeat(x.shape[0] // index.shape[0], 1)
        name = self._metadata.hidden_states_argument_name
        arguments = {**self._arguments, name: gather_tokens(x, rows)}
        output = self._backbone.run(self._forward, arguments, name, index)
        return scatter_tokens(x, rows, self.tokens_of(output)), output

    def tokens_of(self, output: Any) -> torch.Tensor:
        if isinstance(output, tuple):
            return output[self._metadata.return_hidden_states_index]
        return output

    def with_tokens(self, output: Any, tokens: torch.Tensor) -> Any:
        """`output` with the image tokens replaced; the text's part stays."""
        if not isinstance(output, tuple):
            return tokens
        at = self._metadata.return_hidden_states_index
        return (*output[:at], tokens, *output[at + 1 :])


class Mode(Protocol):
    """One call of the transformer. `time` is filled in when the backbone has embedded it."""

    time: torch.Tensor | None

    def run(self, block: BlockCall) -> Any: ...


@dataclass
class Pruned:
    """Inference under a budget."""

    scope: Scope
    scorer: Scorer
    guidance: Guidance
    pair_score: PairScore
    sigmas: tuple[float, ...]  # of each of the scope's requests
    pooled: torch.Tensor
    time: torch.Tensor | None = None
    row: tuple[int, ...] = ()  # k of each block, known when the first block sees its tokens

    def run(self, block: BlockCall) -> Any:
        tokens = block.x.shape[1]
        self.row = self.row or self._row(tokens)
        k = self.row[block.index]
        if k >= tokens:
            return block.dense()
        index = self._selected(block, k)
        x, output = block.on(block.x, index)
        self._report(block.index, tokens, index)
        return block.with_tokens(output, x)

    def _row(self, tokens: int) -> tuple[int, ...]:
        members = zip(self.scope.requests, self.sigmas, strict=True)
        rows = {request.row(sigma, tokens) for request, sigma in members}
        if len(rows) > 1:
            raise Unsupported(
                "requests that share a call must be at the same row of their tables; "
                "group them by PruningRequest.row"
            )
        return rows.pop() or (tokens,) * self.scope.handle.block_count

    def _selected(self, block: BlockCall, k: int) -> torch.Tensor:
        """(images, k). Later calls of a step take what its first call selected."""
        remembers = self.guidance is not Guidance.NONE
        if remembers and (index := self.scope.selected.get(block.index)) is not None:
            if block.x.shape[0] % index.shape[0]:
                raise Unsupported(
                    f"this step selected tokens for {index.shape[0]} images, and now "
                    f"{block.x.shape[0]} rows come; the calls of one step must be of one batch"
                )
            return index
        conditions = conditions_of(self.time, self.pooled)
        scores = standardise(self.scorer(block.index, block.x, conditions))
        index = top_k(scores_of_images(scores, self.guidance, self.pair_score), k)
        if remembers:
            self.scope.selected[block.index] = index
        return index

    def _report(self, block: int, tokens: int, index: torch.Tensor) -> None:
        count = len(self.scope.requests)
        if index.shape[0] % count:
            raise Unsupported(f"{index.shape[0]} images cannot be {count} requests' in equal parts")
        for request, sigma, own in zip(
            self.scope.requests, self.sigmas, index.chunk(count), strict=True
        ):
            if request.on_keep is not None:
                request.on_keep(KeepMap(sigma, block, tokens, own))


@dataclass
class Trained:
    """A training step: hard top-k forward, gradients by the plan's surrogate."""

    plan: TrainingPlan
    blocks: dict[int, BlockRecord]
    outputs: dict[int, torch.Tensor]
    scorer: Scorer
    pooled: torch.Tensor
    time: torch.Tensor | None = None

    def run(self, block: BlockCall) -> Any:
        if block.index in self.plan.mixed:
            output = self._mixed(block)
        else:
            k = self.plan.k[block.index - 1] if block.index else block.x.shape[1]
            output = self._at(block, k)
        if block.index in self.plan.outputs:
            self.outputs[block.index] = block.tokens_of(output)
        return output

    def _at(self, block: BlockCall, k: int) -> Any:
        return block.dense() if k >= block.x.shape[1] else self._pruned(block, k)

    def _mixed(self, block: BlockCall) -> Any:
        """Between the outputs at two k."""
        low, high, share = self.plan.mixed[block.index]
        one, other = self._at(block, low), self._at(block, high)
        if not isinstance(one, tuple):
            return torch.lerp(one, other, share.to(one.dtype))
        # The last block of SD3 has no text to give out.
        return tuple(
            None if a is None else torch.lerp(a, b, share.to(a.dtype))
            for a, b in zip(one, other, strict=True)
        )

    def _pruned(self, block: BlockCall, k: int) -> Any:
        plan, x = self.plan, block.x
        # The router does not train the backbone: what it sees is cut off.
        seen = conditions_of(self.time, self.pooled)
        conditions = Conditions(seen.time.detach(), seen.pooled.detach())
        scores = standardise(self.scorer(block.index, x.detach(), conditions))
        noisy = scores
        if plan.noise:
            noise = torch.randn(
                scores.shape, generator=plan.generator, device=scores.device, dtype=scores.dtype
            )
            noisy = scores + plan.noise * noise
        index = top_k(noisy.detach(), k)
        kept = kept_mask(index, x.shape[1])
        if plan.surrogate is None:
            self.blocks[block.index] = BlockRecord(k, scores, noisy, kept, None)
            y, output = block.on(x, index)
            return block.with_tokens(output, y)
        pi = soft_selection(noisy, self._continuous_k(block, k), plan.surrogate)
        self.blocks[block.index] = BlockRecord(k, scores, noisy, kept, pi)
        estimator = plan.surrogate.estimator
        gated = gate_input(x, pi, kept, estimator)
        y, output = block.on(gated, index)
        delta = plan.teacher_delta.get(block.index)
        return block.with_tokens(output, gate_output(gated, y, pi, kept, estimator, delta))

    def _continuous_k(self, block: BlockCall, k: int) -> torch.Tensor:
        """N r, not floored, so that the gradient reaches the policy; a mixed block has its own."""
        if self.plan.ratios is None or block.index in self.plan.mixed:
            return torch.tensor(float(k), device=block.x.device)
        return block.x.shape[1] * self.plan.ratios[block.index - 1].float()


@dataclass
class Observed:
    """All tokens, with what the blocks give out kept for a student to learn from."""

    observation: Observation
    time: torch.Tensor | None = None

    def run(self, block: BlockCall) -> Any:
        output = block.dense()
        record, tokens = self.observation.record, block.tokens_of(output)
        if block.index in self.observation.outputs:
            record.outputs[block.index] = tokens
        if block.index in self.observation.deltas:
            record.deltas[block.index] = tokens - block.x
        return output


def conditions_of(time: torch.Tensor | None, pooled: torch.Tensor) -> Conditions:
    if time is None:
        raise ShivaError("a block ran before the transformer embedded its timestep")
    return Conditions(time, pooled)
