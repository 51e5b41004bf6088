# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Token merging in the manner of ToMe-SD (arXiv 2303.17604), untrained: what pruning must beat.

One token of every 2 x 2 window is a destination. Of the others, those most similar to a destination
are averaged into it, until k tokens are left; the block runs on these, and what it *adds* to a
destination is added to everything merged into it. Only the change is copied, as in ToMe-SD, where
the residual stream keeps a token's own value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.nn import functional

from shiva_kernels.backbones.base import blocks_of, metadata_of, named
from shiva_kernels.errors import Unsupported

_HOOK = "shiva_token_merging"


@dataclass(frozen=True)
class Merging:
    """Who goes where: `kept` [B, k] tokens that the block runs on, of which the first are the
    destinations, and `owner` [B, N], the place in `kept` whose change each token takes."""

    kept: Tensor
    owner: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """The means over what each kept token stands for, [B, k, D]."""
        spread = self.owner[..., None].expand(-1, -1, x.shape[-1])
        out = x.new_zeros(x.shape[0], self.kept.shape[1], x.shape[2])
        return out.scatter_reduce(1, spread, x, "mean", include_self=False)

    def spread(self, change: Tensor) -> Tensor:
        """The change of each token's owner, [B, N, D]."""
        return change.gather(1, self.owner[..., None].expand(-1, -1, change.shape[-1]))


def match(x: Tensor, k: int, side: int) -> Merging:
    """Merge tokens x [B, N, D] of a picture `side` tokens wide until `k` are left.

    Raises:
        Unsupported: fewer than a quarter of the tokens, which are destinations, or uneven sides.
    """
    batch, tokens, _ = x.shape
    if tokens % side or side % 2 or (tokens // side) % 2:
        raise Unsupported(f"merging wants even sides, not {side} x {tokens // side} tokens")
    places = torch.arange(tokens, device=x.device)
    is_destination = ((places // side) % 2 == 0) & ((places % side) % 2 == 0)
    destinations, sources = places[is_destination], places[~is_destination]
    if not len(destinations) <= k <= tokens:
        raise Unsupported(f"merging {tokens} tokens leaves {len(destinations)} or more, not {k}")
    unit = functional.normalize(x.float(), dim=-1)
    best, where = (unit[:, sources] @ unit[:, destinations].mT).max(-1)  # [B, sources]
    order = best.argsort(dim=1, descending=True, stable=True)
    merged, alone = order[:, : tokens - k], order[:, tokens - k :]
    kept = torch.cat([destinations.expand(batch, -1), sources[alone]], 1)
    owner = torch.empty(batch, tokens, dtype=torch.long, device=x.device)
    owner.scatter_(1, kept, torch.arange(k, device=x.device).expand(batch, -1))
    owner.scatter_(1, sources[merged], where.gather(1, merged))
    return Merging(kept, owner)


class MergingHook(ModelHook):
    """Runs a block on k merged tokens instead of all."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block's outputs, with the image tokens [B, N, D] all there."""
        arguments, metadata = named(module, args, kwargs), metadata_of(module)
        name = metadata.hidden_states_argument_name
        x: Tensor = arguments[name]
        k = max(1, int(x.shape[1] * self.ratio))
        merging = match(x, k, side=round(x.shape[1] ** 0.5))
        small = merging.merge(x)
        forward: Any = self.fn_ref.original_forward
        output = forward(**arguments | {name: small})
        at = metadata.return_hidden_states_index
        change = (output[at] if isinstance(output, tuple) else output) - small
        whole = x + merging.spread(change)
        if not isinstance(output, tuple):
            return whole
        return tuple(whole if i == at else value for i, value in enumerate(output))


@contextmanager
def merged(transformer: nn.Module, ratio: float) -> Iterator[None]:
    """Merge in every block but the first; square pictures of a plain `SD3Transformer2DModel`."""
    blocks = [block for _, block in blocks_of(transformer)][1:]
    for block in blocks:
        HookRegistry.check_if_exists_or_initialize(block).register_hook(MergingHook(ratio), _HOOK)
    try:
        yield
    finally:
        for block in blocks:
            HookRegistry.check_if_exists_or_initialize(block).remove_hook(_HOOK, recurse=False)
