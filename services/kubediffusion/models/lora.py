# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""LoRAs of one network, switched from request to request.

A LoRA is loaded on its first use and then only enabled where a request asks for it: with all
adapters off, PEFT's layers call the layer they wrap and nothing else, so other requests keep their
bits. Loading and switching go through diffusers' own mixin, which is what a pipeline does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.utils import (
    delete_adapter_layers,
    set_adapter_layers,
    set_weights_and_activate_adapters,
)

from kubediffusion.errors import InvalidInput, UnsupportedModel
from kubediffusion.models.base import Lora
from kubediffusion.models.loading import open_whole

MAX_ADAPTERS = 16


class Adapters:
    """The LoRAs of `module`; `prefix` is its name in a LoRA file, such as "transformer"."""

    def __init__(self, module: Any, prefix: str, limit: int = MAX_ADAPTERS) -> None:
        self._module = module
        self._prefix = prefix
        self._limit = limit
        # Adapter name by LoRA's file, least recently used first; None: nothing for this module.
        self._loaded: dict[tuple[Path, str], str | None] = {}
        self._active: tuple[tuple[str, float], ...] = ()

    def use(self, loras: Sequence[Lora]) -> None:
        """From now on exactly these, until the next call. Raises UnsupportedModel, InvalidInput."""
        if len(loras) > self._limit:
            raise InvalidInput(
                f"{len(loras)} LoRAs at once are too many; {self._limit} at most", field="loras"
            )
        wanted: list[tuple[str, float]] = []
        for lora in loras:
            name = self._name(lora, keep={(other.path, other.weight_name) for other in loras})
            if name is not None:
                wanted.append((name, lora.scale))
        if tuple(wanted) == self._active:
            return
        if wanted:
            names, scales = [name for name, _ in wanted], [scale for _, scale in wanted]
            set_adapter_layers(self._module, enabled=True)
            set_weights_and_activate_adapters(self._module, names, scales)
        elif self._active:
            set_adapter_layers(self._module, enabled=False)
        self._active = tuple(wanted)

    def _name(self, lora: Lora, keep: set[tuple[Path, str]]) -> str | None:
        key = (lora.path, lora.weight_name)
        if key in self._loaded:
            self._loaded[key] = name = self._loaded.pop(key)
            return name
        while len(self._loaded) >= self._limit:
            self._forget(next(other for other in self._loaded if other not in keep))
        name = self._load(lora)
        self._loaded[key] = name
        # Loading activates what was loaded: say so, and let `use` set it right.
        self._active = (("", 0.0),) if name is not None else self._active
        return name

    def _load(self, lora: Lora) -> str | None:
        state = self._state(lora)
        if not any(key.startswith(f"{self._prefix}.") for key in state):
            return None
        name = "l" + hashlib.sha256(f"{lora.path}\0{lora.weight_name}".encode()).hexdigest()[:16]
        try:
            if self._prefix == "transformer":
                SD3LoraLoaderMixin.load_lora_into_transformer(
                    state, self._module, adapter_name=name
                )
            else:
                SD3LoraLoaderMixin.load_lora_into_text_encoder(
                    state, None, self._module, prefix=self._prefix, adapter_name=name
                )
        except (ValueError, RuntimeError, KeyError) as error:
            raise UnsupportedModel(
                f"LoRA {lora.name!r} does not fit this {self._prefix}: "
                f"{str(error).splitlines()[0][:300]}; it was trained for another architecture",
                field=f"loras.{lora.name}",
                reason="WrongArchitecture",
            ) from error
        return name

    def _state(self, lora: Lora) -> dict[str, Any]:
        file = _file_of(lora)
        open_whole(file)
        state = SD3LoraLoaderMixin.lora_state_dict(
            str(file.parent), weight_name=file.name, use_safetensors=True, local_files_only=True
        )
        assert isinstance(state, dict)
        if not state or not all("lora" in key for key in state):
            raise UnsupportedModel(
                f"{file.name} holds no LoRA in diffusers' format",
                field=f"loras.{lora.name}",
                reason="WrongArchitecture",
            )
        return state

    def _forget(self, key: tuple[Path, str]) -> None:
        name = self._loaded.pop(key)
        if name is not None:
            delete_adapter_layers(self._module, name)
            self._active = (("", 0.0),)


def _file_of(lora: Lora) -> Path:
    if lora.path.is_file():
        return lora.path
    files = [lora.path / lora.weight_name] if lora.weight_name else []
    files = files or sorted(lora.path.glob("*.safetensors"))
    if len(files) != 1 or not files[0].is_file():
        found = ", ".join(file.name for file in files) or "none"
        raise UnsupportedModel(
            f"LoRA {lora.name!r} must be one safetensors file, found {found} in {lora.path.name}/; "
            "name it with `weightName`",
            field=f"loras.{lora.name}",
            reason="NotSafetensors",
        )
    return files[0]
