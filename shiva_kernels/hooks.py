# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The hooks, on diffusers' own registry: at the transformer, its time embedding, its blocks.

Where no mode is set, each of them calls the forward that it found and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager

from shiva_kernels.backbones.base import metadata_of, named
from shiva_kernels.modes import BlockCall, Mode

if TYPE_CHECKING:
    from shiva_kernels.apply import ShivaHandle

ROOT_HOOK = "shiva_transformer"
TIME_HOOK = "shiva_time"
BLOCK_HOOK = "shiva_block"

# The handle whose transformer is running, and how.
_RUNNING: ContextVar[tuple[ShivaHandle, Mode] | None] = ContextVar("shiva_running", default=None)


def _mode_of(handle: ShivaHandle) -> Mode | None:
    running = _RUNNING.get()
    return running[1] if running is not None and running[0] is handle else None


@contextmanager
def running(handle: ShivaHandle, mode: Mode) -> Iterator[None]:
    """Blocks of the handle's transformer run in `mode` within."""
    token = _RUNNING.set((handle, mode))
    try:
        yield
    finally:
        _RUNNING.reset(token)


class RootHook(ModelHook):
    """Sets the mode for the time of one call."""

    # diffusers tells stateful hooks the name of a pipeline's `cache_context`, by this attribute.
    _is_stateful = True

    def __init__(self, handle: ShivaHandle) -> None:
        super().__init__()
        self._handle = handle
        self._context = StateManager(BaseState)  # type: ignore[arg-type]

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward: Any = self.fn_ref.original_forward
        mode = self._handle.mode_of_call(named(module, args, kwargs), self._branch())
        if mode is None:
            return forward(*args, **kwargs)
        with running(self._handle, mode):
            return forward(*args, **kwargs)

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self._context.reset()
        return module

    def _branch(self) -> str:
        """What the pipeline calls this call: "cond", "uncond"; "" where it says nothing."""
        context = self._context._context
        return context.name if context is not None else ""


class TimeHook(ModelHook):
    """Hands the time embedding to the router."""

    def __init__(self, handle: ShivaHandle) -> None:
        super().__init__()
        self._handle = handle

    def post_forward(self, module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
        mode = _mode_of(self._handle)
        if mode is not None:
            mode.time = output
        return output


class BlockHook(ModelHook):
    """Runs the block as the mode says. `compiled` takes the forward's place where it is set."""

    def __init__(self, handle: ShivaHandle, index: int) -> None:
        super().__init__()
        self._handle, self._index = handle, index
        self.compiled: Callable[..., Any] | None = None

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self._metadata = metadata_of(module)
        return module

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward: Any = self.compiled or self.fn_ref.original_forward
        mode = _mode_of(self._handle)
        if mode is None:
            return forward(*args, **kwargs)
        arguments = named(module, args, kwargs)
        return mode.run(
            BlockCall(self._index, self._handle.backbone, self._metadata, forward, arguments)
        )


def register(module: torch.nn.Module, hook: ModelHook, name: str) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


def unregister(module: torch.nn.Module, name: str) -> None:
    """Takes the hook off; with the last one gone, the module is as it was made."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    if registry is None:
        return
    registry.remove_hook(name, recurse=False)
    if not registry.hooks:
        module.__dict__.pop("forward", None)
        del module._diffusers_hook
