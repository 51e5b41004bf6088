# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`apply_shiva`: the face of the library."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks.hooks import HookRegistry

from shiva_kernels import hooks, state
from shiva_kernels.adapter import DenseWeights, has_adapters, merge_adapter
from shiva_kernels.artifact import Artifact
from shiva_kernels.backbones import backbone_of, blocks_of
from shiva_kernels.config import Guidance, OnKeep, PairScore, ShivaConfig
from shiva_kernels.errors import Unsupported
from shiva_kernels.modes import Mode, Observed, Pruned, Trained
from shiva_kernels.state import (
    Conditions,
    Observation,
    PruningRequest,
    Record,
    Scope,
    Scorer,
    Training,
    TrainingPlan,
)
from shiva_kernels.tables import KTable, build_table

if TYPE_CHECKING:
    from shiva_kernels.flops import CostModel, Flops

_UNSET: Any = object()
_ALLOWED_ON_ATTENTION = ("layerwise_casting", "peft_autocast_disable", "group_offloading")


def apply_shiva(transformer: Any, config: ShivaConfig) -> ShivaHandle:
    """Prunes `transformer` under a static token budget, in place, until `handle.remove()`.

    The artifact's adapter is merged into the weights; user LoRAs go on top afterwards, quantisation
    too. Step caches (first-block cache, MagCache) are enabled after this as well. Raises
    ArtifactMismatch for an artifact of another backbone, Unsupported for a transformer that cannot
    be pruned as it is.
    """
    backbone = backbone_of(transformer)
    _check_fresh(transformer)
    artifact = config.artifact
    if not isinstance(artifact, Artifact):
        artifact = Artifact.load(artifact, revision=config.revision)
    artifact.check_backbone(transformer)
    if config.budget is not None:
        artifact.check_budget(config.budget)
    merged = merge_adapter(transformer, artifact.adapter, keep_dense=config.keep_dense)
    return ShivaHandle(transformer, backbone, artifact, config, merged)


class ShivaHandle:
    """A pruned transformer. Thread- and coroutine-safe as far as the transformer is."""

    def __init__(
        self,
        transformer: Any,
        backbone: Any,
        artifact: Artifact,
        config: ShivaConfig,
        merged: DenseWeights,
    ) -> None:
        self.transformer, self.backbone = transformer, backbone
        self.artifact, self.config = artifact, config
        self.router = artifact.router
        self._merged = merged
        self._blocks = blocks_of(transformer)
        self._costs: dict[tuple[int, tuple[int, int], int], CostModel] = {}
        self.block_hooks = [hooks.BlockHook(self, i) for i in range(len(self._blocks))]
        hooks.register(transformer, hooks.RootHook(self), hooks.ROOT_HOOK)
        hooks.register(backbone.time_embedder(transformer), hooks.TimeHook(self), hooks.TIME_HOOK)
        for (_, block), hook in zip(self._blocks, self.block_hooks, strict=True):
            hooks.register(block, hook, hooks.BLOCK_HOOK)
        _registry_changed(transformer)

    @property
    def block_count(self) -> int:
        return len(self._blocks)

    @property
    def blocks(self) -> list[torch.nn.Module]:
        return [block for _, block in self._blocks]

    def remove(self) -> None:
        """Takes everything off: the user's own dense model, bit for bit.

        Raises ShivaError where an adapter was merged and its dense weights were not kept.
        """
        self._merged.restore(self.transformer)
        hooks.unregister(self.transformer, hooks.ROOT_HOOK)
        hooks.unregister(self.backbone.time_embedder(self.transformer), hooks.TIME_HOOK)
        for _, block in self._blocks:
            hooks.unregister(block, hooks.BLOCK_HOOK)
        _registry_changed(self.transformer)

    # ---------------------------------------------------------------- requests

    def request(
        self,
        budget: float | None = _UNSET,
        *,
        sigmas: Sequence[float] | None = None,
        guidance: Guidance | None = None,
        pair_score: PairScore | None = None,
        on_keep: OnKeep | None = None,
        scorer: Scorer | None = None,
    ) -> PruningRequest:
        """How one request is pruned; what is not given is the config's.

        `with request.step(sigma)` goes around the calls of one denoising step,
        `with request.steps()` around a pipeline's whole loop.
        """
        if budget is _UNSET:
            budget = self.config.budget
        if budget is not None:
            budget = self.artifact.check_budget(budget)
        return PruningRequest(
            self,
            budget,
            tuple(float(sigma) for sigma in sigmas) if sigmas is not None else None,
            guidance or self.config.guidance,
            pair_score or self.config.pair_score,
            on_keep or self.config.on_keep,
            scorer,
        )

    def together(
        self, members: Sequence[tuple[PruningRequest, float]]
    ) -> AbstractContextManager[None]:
        """One call for several (request, sigma), whose images stand in this order in the batch.

        Only for requests at the same table row (`PruningRequest.row`) and of one shape. With
        guidance pairs the batch holds the unconditional rows of all, then the conditional ones.
        """
        return state.together(members)

    def training(self, plan: TrainingPlan) -> AbstractContextManager[Record]:
        """Calls within run as a training step of `plan`, and fill the record."""
        return state.training(self, plan)

    def observe(
        self, outputs: Sequence[int] = (), deltas: Sequence[int] = ()
    ) -> AbstractContextManager[Record]:
        """Calls within keep all tokens and record these blocks: a teacher's forward."""
        return state.observation(self, frozenset(outputs), frozenset(deltas))

    def table(
        self, budget: float, sigmas: Sequence[float] | None = None, tokens: int | None = None
    ) -> KTable:
        """k[step][block] of a shipped budget; by default on the artifact's own grid and size."""
        shipped = self.artifact.tables[self.artifact.check_budget(budget)]
        grid = tuple(sigmas) if sigmas is not None else self._grid() or shipped.sigmas
        return build_table(
            shipped.curve, shipped.budget, grid, tokens or shipped.tokens, self.artifact.multiple
        )

    def flops(
        self,
        budget: float,
        rows: int,
        size: tuple[int, int],
        text: int,
        sigmas: Sequence[float] | None = None,
    ) -> tuple[Flops, Flops]:
        """A mean step under `budget`, and a dense one: what stands beside a budget.

        Of `rows` rows, latents of `size` (height, width), `text` text tokens. Counted on the meta
        device; the first call for a shape takes seconds.
        """
        from shiva_kernels.flops import cost_model

        if (rows, size, text) not in self._costs:
            self._costs[rows, size, text] = cost_model(self.transformer, rows, size, text)
        cost = self._costs[rows, size, text]
        return cost.of_table(self.table(budget, sigmas, cost.tokens)), cost.dense

    # ---------------------------------------------------------------- one call

    def mode_of_call(self, arguments: dict[str, Any], branch: str) -> Mode | None:
        """How this call of the transformer runs; None for untouched."""
        entered = state.entered_of(self)
        if isinstance(entered, Observation):
            return Observed(entered)
        if isinstance(entered, Training):
            self._check_call(arguments)
            plan = entered.plan
            pooled = self.backbone.pooled(arguments)
            record = entered.record
            return Trained(plan, record.blocks, record.outputs, plan.scorer or self.score, pooled)
        scope = entered or Scope(self, (self.request(),), None)
        if all(request.budget is None for request in scope.requests):
            return None
        return self._pruned(scope, arguments, branch, implicit=entered is None)

    def score(self, block: int, x: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The artifact's router, wherever the transformer has moved to."""
        if next(self.router.parameters()).device != x.device:
            self.router.to(x.device)
        return self.router(x, conditions.time, conditions.pooled, block)

    def _pruned(
        self, scope: Scope, arguments: dict[str, Any], branch: str, implicit: bool
    ) -> Pruned:
        self._check_call(arguments)
        first = scope.requests[0]
        rows = self.backbone.pooled(arguments).shape[0]
        later = self.backbone.is_follower(arguments)
        guidance = first.guidance or (Guidance.SEQUENTIAL if later else self._guidance(rows))
        follows = later or branch == "uncond"
        if implicit and (follows or guidance is Guidance.SEQUENTIAL):
            raise Unsupported(
                "this pipeline calls the transformer several times a step, and all calls must keep "
                "the same tokens: put `with handle.request(guidance=...).steps():` around it"
            )
        if branch == "uncond" and guidance is Guidance.NONE:
            raise Unsupported(
                "this pipeline guides by a second call; give its request Guidance.SEQUENTIAL"
            )
        sigmas = scope.sigmas or (self._sigma(arguments),) * len(scope.requests)
        scope.begin_call(sigmas[0])
        return Pruned(
            scope,
            first.scorer or self.score,
            guidance,
            first.pair_score,
            sigmas,
            self.backbone.pooled(arguments),
        )

    def _guidance(self, rows: int) -> Guidance:
        """What the rows are where neither request nor config says so."""
        guides = getattr(self.config.pipeline, "do_classifier_free_guidance", None)
        if guides is not None:
            return Guidance.PAIR if guides and rows > 1 else Guidance.NONE
        if rows == 1 or self.backbone.rows_are_images:
            return Guidance.NONE
        raise Unsupported(
            f"a batch of {rows} rows could be guidance pairs or images: pass ShivaConfig a "
            "`pipeline` to follow, or `guidance`"
        )

    def _sigma(self, arguments: dict[str, Any]) -> float:
        values = {round(v, 6) for v in self.backbone.sigmas(arguments).flatten().tolist()}
        if len(values) > 1:
            raise Unsupported(
                f"the rows of this call are at {len(values)} timesteps, and k is one for all; "
                "call once for each, or use `handle.together`"
            )
        return values.pop()

    def _grid(self) -> tuple[float, ...] | None:
        """The full sigma grid of the pipeline's present request."""
        scheduler: Any = getattr(self.config.pipeline, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None:
            return None
        return tuple((timesteps.double() / scheduler.config.num_train_timesteps).tolist())

    def _check_call(self, arguments: dict[str, Any]) -> None:
        self.backbone.check(arguments)
        if self.transformer.gradient_checkpointing and torch.is_grad_enabled():
            raise Unsupported(
                "gradient checkpointing runs blocks a second time, outside the call that selected "
                "their tokens; call transformer.disable_gradient_checkpointing()"
            )
        for _, block in self._blocks:
            _check_block(block)


def _check_fresh(transformer: Any) -> None:
    """What must not have happened to a transformer before pruning is applied to it."""
    if has_adapters(transformer):
        raise Unsupported(
            "this transformer has LoRA layers already: apply_shiva first, then load LoRAs on top"
        )
    for name, block in blocks_of(transformer):
        present = list(getattr(getattr(block, "_diffusers_hook", None), "hooks", ()))
        if hooks.BLOCK_HOOK in present:
            raise Unsupported("this transformer is pruned already; remove() its handle first")
        if present:
            raise Unsupported(
                f"{name} carries the hook {present[0]!r}: apply_shiva first, then enable caches "
                "and offloading, so that they see all tokens"
            )
    if getattr(transformer, "_compiled_call_impl", None) is not None:
        raise Unsupported(
            "the transformer is compiled as a whole, which would make a graph for every k; load it "
            "uncompiled and use shiva_kernels.compile_blocks"
        )
    if getattr(transformer, "_parallel_config", None) is not None:
        raise Unsupported("context and tensor parallelism split tokens that pruning must see whole")


def _check_block(block: Any) -> None:
    """What must not have happened since."""
    if getattr(block, "_chunk_size", None) is not None:
        raise Unsupported(
            "chunked feed-forward needs a k that its chunks divide; "
            "call transformer.disable_forward_chunking()"
        )
    for attention in (getattr(block, "attn", None), getattr(block, "attn1", None)):
        registry = getattr(attention, "_diffusers_hook", None)
        for name in getattr(registry, "hooks", ()):
            if name not in _ALLOWED_ON_ATTENTION:
                raise Unsupported(
                    f"the attention cache {name!r} replays another step's tokens, and pruned steps "
                    "keep different ones; disable it, or cache whole steps (first-block cache, "
                    "MagCache)"
                )


def _registry_changed(transformer: Any) -> None:
    registry: Any = getattr(transformer, "_diffusers_hook", None)
    if isinstance(registry, HookRegistry):
        registry.invalidate_child_registries_cache()


__all__ = ["ShivaHandle", "apply_shiva"]
