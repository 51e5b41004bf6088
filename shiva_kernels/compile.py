# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Compiled blocks under eager hooks.

What is compiled is the forward of the block's *class*, with the block as an argument: its weights
are inputs of the graph, so all blocks of a kind share one. Selection, gather and scatter stay eager
around it. (Hooks inside the compiled block gave a graph for each block and each k, and beyond the
recompilation limit silently eager code. Here that limit raises.)
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import torch

from shiva_kernels.apply import ShivaHandle
from shiva_kernels.backbones.base import metadata_of, named
from shiva_kernels.errors import Unsupported
from shiva_kernels.state import TrainingPlan

Backend: TypeAlias = Callable[[Any, Any], Callable[..., Any]]
_VERSIONED = ("torch", "triton", "diffusers")


class Shapes(StrEnum):
    """What the graphs are specialised to."""

    DYNAMIC = "dynamic"  # one graph of each kind of block, for any number of tokens
    PER_K = "per-k"  # one for each number of tokens that the tables use


class CompiledBlocks:
    """The compiled blocks of a handle: how many graphs there are, and what they took."""

    def __init__(
        self,
        handle: ShivaHandle,
        shapes: Shapes,
        backend: Backend | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        self.handle, self.shapes, self.cuda_graphs = handle, shapes, cuda_graphs
        self._inner = backend or (_recorded if cuda_graphs else _inductor)
        self.graphs = 0
        self.seconds = 0.0
        kinds: dict[type, Callable[..., Any]] = {}
        for block, hook in zip(handle.blocks, handle.block_hooks, strict=True):
            kind = type(block)
            if kind not in kinds:
                kinds[kind] = torch.compile(
                    kind.forward,
                    backend=self._backend,
                    fullgraph=True,
                    dynamic=None if shapes is Shapes.DYNAMIC else False,
                )
            hook.compiled = self._call(block, kinds[kind])

    def remove(self) -> None:
        """Back to eager blocks."""
        for hook in self.handle.block_hooks:
            hook.compiled = None

    def warm_up(
        self,
        rows: int,
        size: tuple[int, int],
        text: int,
        ks: Sequence[int] = (),
        inference_mode: bool = True,
    ) -> int:
        """Compiles before the first request, as far as the shapes are these. Returns the graphs.

        `rows` of the batch, `size` of the latents (height, width), `text` tokens; `ks` of all
        tables where there is a graph for each. A graph is of inference mode or of `no_grad`
        (what diffusers' pipelines run under), and neither serves the other.
        """
        transformer = self.handle.transformer
        with torch.inference_mode(inference_mode):
            # The calls lie outside the device's context, which is a guard of every graph.
            with torch.device(transformer.device):
                example = self.handle.backbone.example(transformer, rows, size, text)
            example = {k: _as(v, transformer.dtype) for k, v in example.items()}
            tokens = self._tokens(example)
            wanted = ks if self.shapes is Shapes.PER_K else (max(tokens // 2, 2),)
            with torch.no_grad():
                for k in wanted:
                    plan = TrainingPlan(k=[k] * (self.handle.block_count - 1))
                    with self.handle.training(plan):
                        transformer(**example)
        return self.graphs

    def _tokens(self, example: dict[str, Any]) -> int:
        x = example["hidden_states"]
        if x.ndim == 3:
            return x.shape[1]
        return x.shape[2] * x.shape[3] // self.handle.transformer.config.patch_size**2

    def _call(self, block: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        backbone = self.handle.backbone
        name = metadata_of(block).hidden_states_argument_name
        dynamic = self.shapes is Shapes.DYNAMIC
        begins = self.cuda_graphs and block is self.handle.blocks[0]

        def call(*args: Any, **kwargs: Any) -> Any:
            if begins:
                # What the last call's graphs gave out may be overwritten from here on.
                torch.compiler.cudagraph_mark_step_begin()
            # Slices and transposes would each make a graph of their own.
            arguments = {k: _contiguous(v) for k, v in named(block, args, kwargs).items()}
            if dynamic:
                for tensor, axis in backbone.token_axes(arguments, name):
                    torch._dynamo.maybe_mark_dynamic(tensor, axis)
            return forward(block, **arguments)

        return call

    def _backend(self, graph: Any, example_inputs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._inner(graph, example_inputs)
        finally:
            self.graphs += 1
            self.seconds += time.perf_counter() - start


def compile_blocks(
    handle: ShivaHandle,
    shapes: Shapes = Shapes.DYNAMIC,
    expected_graphs: int = 64,
    backend: Backend | None = None,
    cuda_graphs: bool = False,
) -> CompiledBlocks:
    """Compiles the blocks of `handle` at their next calls; `warm_up` does it at once.

    Raises torch's own error past `expected_graphs` recompilations of one class of blocks, instead
    of falling back to eager code; torch's limit is a global setting, and is raised to this where
    lower. `backend` takes inductor's place: (graph, example inputs) -> callable.

    `cuda_graphs` has inductor record each block at each k and replay it, which a static budget
    allows. Prepared, and never run on a GPU so far: off by default. Raises Unsupported for a
    transformer that is not on one.
    """
    device = torch.device(handle.transformer.device)
    if cuda_graphs and device.type != "cuda":
        raise Unsupported(f"CUDA graphs want a transformer on a GPU, and this is on {device.type}")
    for block in handle.blocks:
        if getattr(block, "_compiled_call_impl", None) is not None:
            raise Unsupported("the blocks are compiled already, with their hooks; load them anew")
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, expected_graphs)
    return CompiledBlocks(handle, shapes, backend, cuda_graphs)


def _inductor(graph: Any, example_inputs: Any) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, example_inputs)  # type: ignore[return-value]


def _recorded(graph: Any, example_inputs: Any) -> Callable[..., Any]:
    """Inductor with its CUDA graphs: one recording for each block and each number of tokens."""
    from torch._inductor.compile_fx import compile_fx

    patches = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": False}
    return compile_fx(graph, example_inputs, config_patches=patches)  # type: ignore[return-value]


def cache_key(identity: str, device: torch.device) -> str:
    """Names a folder of compiled code: what it was made from, for, and by."""
    parts = [identity, device.type, platform.machine()]
    if device.type == "cuda":
        parts += [torch.cuda.get_device_name(device), str(torch.cuda.get_device_capability(device))]
    else:
        parts.append(torch.backends.cpu.get_cpu_capability())
    for package in _VERSIONED:
        try:
            parts.append(f"{package}={version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package}=none")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def use_cache(root: Path, identity: str, device: torch.device) -> Path:
    """Keeps compiled code under `root` from one start to the next. Call before compiling.

    The code in there is loaded and run: the folder belongs to this user alone, and one that another
    may write to is refused (Unsupported).
    """
    folder = root / cache_key(identity, device)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise Unsupported(
            f"{folder} holds code that would be run, and others can write to it; "
            "remove it or name another folder"
        )
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    return folder


def _contiguous(value: Any) -> Any:
    """A tensor of its own with the strides of its shape; anything else as it is.

    `Tensor.contiguous` keeps views, and a batch of one with any stride; guards look at both.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if not value._is_view() and value.stride() == _strides(value.shape):
        return value
    return value.clone(memory_format=torch.contiguous_format)


def _strides(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))


def _as(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value
