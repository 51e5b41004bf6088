# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Step caches of a denoiser: diffusers' MagCache hooks, their state with the lease.

A step that reuses adds to the first block's input what all blocks together added at the last step
that was computed, and runs none of them. Which steps do is decided by the lease's own settings and
what it has accumulated; the hooks are told, before each step, whose that is. Without a cached lease
there are no hooks: other requests' bits are those of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.hooks import CacheContext, HookRegistry, StateManager
from diffusers.hooks.mag_cache import (
    MagCacheBlockHook,
    MagCacheConfig,
    MagCacheHeadHook,
    MagCacheState,
    apply_mag_cache,
)

from kubediffusion.errors import InvalidInput
from kubediffusion.models.base import StepCache
from shiva_kernels.hooks import unregister

FIELD = "step_cache"


class LeaseCache:
    """One lease's: nothing of it outlives the lease, nor goes into a checkpoint."""

    def __init__(self, config: MagCacheConfig, first_step: int) -> None:
        self.config = config
        self.states = _states()
        self.states.set_context(CacheContext("lease"))
        # Of the request's whole grid: of its calibration, image-to-image has the last part.
        self._state.step_index = first_step

    @property
    def _state(self) -> Any:
        return self.states.get_state()

    @property
    def reuses(self) -> bool:
        """Whether the step reuses; known once the first block was reached."""
        return not self._state.should_compute


def _states() -> StateManager:
    return StateManager(MagCacheState)  # type: ignore[arg-type]


def lease_cache(asked: StepCache, *, grid: int, first_step: int) -> LeaseCache:
    """For a lease that begins at `first_step` of its request's `grid` of steps.

    Raises InvalidInput, field ``step_cache``.
    """
    if asked.method != "magcache":
        raise InvalidInput(f"this family has no step cache {asked.method!r}", field=FIELD)
    if len(asked.ratios) < 2 or asked.threshold <= 0:
        raise InvalidInput("it needs a threshold and the ratios of its calibration", field=FIELD)
    config = MagCacheConfig(
        threshold=asked.threshold,
        max_skip_steps=asked.max_skip_steps,
        retention_ratio=asked.retention,
        num_inference_steps=grid,
        mag_ratios=torch.tensor(asked.ratios),
    )
    return LeaseCache(config, first_step)


class StepCaches:
    """The hooks on `module`, while a lease with a cache has it."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._hooks: list[tuple[torch.nn.Module, str, Any]] = []
        self._nobody = _states()
        self.steps_reused = 0

    @contextmanager
    def step(self, lease: LeaseCache | None) -> Iterator[None]:
        """Around one call of the module, for `lease` alone; None for a lease without a cache."""
        if lease is None:
            self._remove()
            yield
            return
        if not self._hooks:
            # On top of whatever hooks there are, such as those of pruning: it sees all tokens.
            apply_mag_cache(self._module, lease.config)
            self._hooks = _hooks_of(self._module)
        self._bind(lease.config, lease.states)
        try:
            yield
        finally:
            self._bind(lease.config, self._nobody)  # the lease's tensors go when it goes
        self.steps_reused += lease.reuses

    def _bind(self, config: MagCacheConfig, states: StateManager) -> None:
        for _, _, hook in self._hooks:
            hook.config, hook.state_manager = config, states

    def _remove(self) -> None:
        for block, name, _ in self._hooks:
            unregister(block, name)
        self._hooks = []


def _hooks_of(module: torch.nn.Module) -> list[tuple[torch.nn.Module, str, Any]]:
    """(block, the hook's name there, MagCache hook)."""
    registries = [(m, getattr(m, "_diffusers_hook", None)) for m in module.modules()]
    return [
        (block, name, hook)
        for block, registry in registries
        if isinstance(registry, HookRegistry)
        for name, hook in registry.hooks.items()
        if isinstance(hook, MagCacheHeadHook | MagCacheBlockHook)
    ]


class LateResiduals(Sequence[Any]):
    """A ControlNet's residuals, computed when the first of them is added.

    That is after the first block, which knows by then whether the step reuses. What is reused has
    the residuals of its own step in it: nothing may be added to it, and no ControlNet has to run.
    """

    def __init__(
        self, count: int, lease: LeaseCache, compute: Callable[[], Sequence[torch.Tensor]]
    ) -> None:
        self._count, self._lease, self._compute = count, lease, compute
        self._computed: Sequence[torch.Tensor] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if self._lease.reuses:
            return 0.0
        if self._computed is None:
            self._computed = self._compute()
        return self._computed[index]
