# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""ControlNets: called by the denoiser beside it at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetModel

from kubediffusion.errors import InvalidInput
from kubediffusion.models.base import LoadSpec, Lora, PortValue
from kubediffusion.models.loading import load_module, nbytes_of


class Sd3ControlNet:
    """`models.base.Model`, without a stage that a task could ask for."""

    stages = ("control",)

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self.module: Any = load_module(spec, SD3ControlNetModel)

    @property
    def facts(self) -> Mapping[str, str | int | float | bool]:
        zeros = bool(self.module.config.force_zeros_for_pooled_projection)
        return {"force_zeros_for_pooled_projection": zeros}

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.module)

    def run(
        self, stage: str, inputs: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> Mapping[str, PortValue]:
        raise InvalidInput(
            f"a ControlNet runs within a denoiser's steps, not as {stage!r}", field="stage"
        )

    def unload(self) -> None:
        del self.module


class LentPosEmbeds:
    """A transformer's position embedding, for ControlNets that have none (SD3.5 large)."""

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer
        self._copies: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def of(self, net: Any) -> Any:
        """A copy in the ControlNet's dtype; made once for each ControlNet."""
        if net not in self._copies:
            copied = net._get_pos_embed_from_transformer(self._transformer)
            self._copies[net] = copied.to(net.dtype).to(net.device)
        return self._copies[net]
