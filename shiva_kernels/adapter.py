# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The artifact's DoRA: merged into the weights once, at load.

Unmerged, DoRA makes every linear layer about twice as slow, and its order of operations changes the
sums. Merged, the pruned model is the backbone's own code with other weights; a user's LoRA then
goes on top of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from shiva_kernels.errors import ArtifactMismatch, ShivaError, Unsupported

_NAME = "shiva"


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter: the arguments of its LoraConfig, and its weights by PEFT's names."""

    config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]


@dataclass
class DenseWeights:
    """The layers that a merge changed, with their weights before it where these are kept."""

    kept: dict[torch.nn.Module, torch.Tensor] = field(
        default_factory=dict[torch.nn.Module, torch.Tensor]
    )
    lost: bool = False

    @torch.no_grad()
    def restore(self, transformer: torch.nn.Module) -> None:
        """Raises ShivaError where they were not kept, or where their layers are gone."""
        if self.lost:
            raise ShivaError(
                "the adapter is merged and the dense weights were not kept "
                "(keep_dense=False); load the transformer again"
            )
        present = set(transformer.modules())
        if any(layer not in present for layer in self.kept):
            raise ShivaError(
                "layers that the adapter was merged into have been replaced since (quantised?), "
                "and their dense weights with them; load the transformer again"
            )
        for layer, weight in self.kept.items():
            parameter: Any = layer.weight
            parameter.copy_(weight)
        self.kept.clear()


def has_adapters(transformer: torch.nn.Module) -> bool:
    """Whether PEFT has wrapped any layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in transformer.modules())


def merge_adapter(
    transformer: Any, adapter: Adapter | None, keep_dense: bool = True
) -> DenseWeights:
    """Merges `adapter` into the weights of `transformer`. Raises ArtifactMismatch, Unsupported."""
    if adapter is None:
        return DenseWeights()
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    inject_adapter_in_model(LoraConfig(**adapter.config), transformer, adapter_name=_NAME)
    try:
        layers: list[Any] = [m for m in transformer.modules() if isinstance(m, BaseTunerLayer)]
        bases: list[Any] = [layer.get_base_layer() for layer in layers]
        if odd := next((b for b in bases if type(b) is not torch.nn.Linear), None):
            raise Unsupported(
                f"the artifact's adapter cannot be merged into {type(odd).__name__}: load the "
                "transformer unquantised, apply the artifact, then quantise"
            )
        result = set_peft_model_state_dict(transformer, dict(adapter.weights), adapter_name=_NAME)
        missing = [key for key in result.missing_keys if f".{_NAME}." in key]
        if result.unexpected_keys or missing:
            wrong = (*result.unexpected_keys, *missing)[0]
            raise ArtifactMismatch(f"the artifact's adapter does not fit: {wrong}")
        dense = DenseWeights(lost=not keep_dense)
        for layer, base in zip(layers, bases, strict=True):
            if keep_dense:
                dense.kept[base] = base.weight.detach().to("cpu", copy=True)
            layer.merge(safe_merge=True, adapter_names=[_NAME])
            base.requires_grad_(False)
        return dense
    finally:
        recurse_remove_peft_layers(transformer)
        transformer.__dict__.pop("peft_config", None)
