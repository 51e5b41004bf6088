# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What the hooks must know of an architecture."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import nn

from shiva_kernels.errors import Unsupported

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Widths:
    """Of a token, of the time embedding, and of the pooled text: what a router is made of."""

    dim: int
    time: int
    pooled: int


class Backbone(ABC):
    """One architecture. Stateless: every method is given the module."""

    name: str
    # Whether a batch of several rows is always one of images: pipelines of this architecture never
    # put both guidance branches into one call.
    rows_are_images = False

    @abstractmethod
    def widths(self, transformer: Any) -> Widths: ...

    @abstractmethod
    def time_embedder(self, transformer: Any) -> nn.Module:
        """The module whose output (B, T) is the embedding of the time alone."""

    @abstractmethod
    def pooled(self, arguments: Arguments) -> torch.Tensor:
        """The text in one vector a row (B, P), from the arguments of the transformer's forward."""

    @abstractmethod
    def sigmas(self, arguments: Arguments) -> torch.Tensor:
        """Noise levels in [0, 1], of any shape."""

    def token_axes(self, arguments: Arguments, name: str) -> list[tuple[torch.Tensor, int]]:
        """Which axes of a block's arguments follow the number of its image tokens."""
        return [(arguments[name], 1)]

    @abstractmethod
    def example(self, transformer: Any, rows: int, size: tuple[int, int], text: int) -> Arguments:
        """Inputs of `rows` rows, for warming up and counting: zeros on the current device.

        `size` is height and width in latents, `text` the number of text tokens.
        """

    def check(self, arguments: Arguments) -> None:
        """Raises Unsupported for a call that cannot be pruned."""
        extra = arguments.get("joint_attention_kwargs") or {}
        adapters = sorted(name for name in extra if name.startswith("ip_"))
        if adapters:
            raise Unsupported(
                f"an IP-Adapter ({', '.join(adapters)}) with token pruning is not supported; "
                "ask for budget None in this request"
            )

    def is_follower(self, arguments: Arguments) -> bool:
        """Whether this call can only be a later call of its step (skip-layer guidance)."""
        return False

    def run(
        self, forward: Callable[..., Any], arguments: Arguments, name: str, index: torch.Tensor
    ) -> Any:
        """The block on the tokens in arguments[name] (B, k, D), which are `index` (images, k)."""
        return forward(**arguments)


def blocks_of(transformer: nn.Module) -> list[tuple[str, nn.Module]]:
    """All blocks in the order in which they run, with their names."""
    return [
        (f"{name}.{i}", block)
        for name, child in transformer.named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, nn.ModuleList)
        for i, block in enumerate(child)
    ]


def metadata_of(block: nn.Module) -> TransformerBlockMetadata:
    """diffusers' own description of the block's arguments and outputs."""
    return TransformerBlockRegistry.get(type(block))


@functools.cache
def _signature(cls: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(cls.forward)


def named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """The arguments of a forward by name, as they were given: defaults are left out."""
    bound = _signature(type(module)).bind(module, *args, **kwargs).arguments
    arguments = dict(bound)
    arguments.pop("self", None)
    arguments.update(arguments.pop("kwargs", {}))
    return arguments
