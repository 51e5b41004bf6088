# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""LoRAs of one network, switched from request to request.

A LoRA is loaded on its first use and then only enabled where a request asks for it: with all
adapters off, PEFT's layers call the layer they wrap and nothing else, so other requests keep their
bits. Loading and switching go through diffusers' own mixin, which is what a pipeline does; that
nothing of a file is left out is checked here, as diffusers would only log it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import SD3LoraLoaderMixin
from diffusers.utils.peft_utils import (
    delete_adapter_layers,
    set_adapter_layers,
    set_weights_and_activate_adapters,
)
from peft import get_peft_model_state_dict

from kubediffusion.errors import InvalidInput, UnsupportedModel
from kubediffusion.models.base import Lora
from kubediffusion.models.loading import first_line, open_whole

MAX_ADAPTERS = 16
_PREFIXES = {"transformer", "text_encoder", "text_encoder_2"}
# The file, and how many times the request named it before.
_Key = tuple[Path, str, int]


class Adapters:
    """The LoRAs of `module`; `prefix` is its name in a LoRA file, such as "transformer"."""

    def __init__(self, module: Any, prefix: str, limit: int = MAX_ADAPTERS) -> None:
        self._module = module
        self._prefix = prefix
        self._limit = limit
        # Adapter's name by LoRA, least recently used first; None: nothing for this module.
        self._loaded: dict[_Key, str | None] = {}
        # Adapters and scales switched on; None while that is unknown.
        self._active: tuple[tuple[str, float], ...] | None = ()

    def use(self, loras: Sequence[Lora]) -> None:
        """From now on exactly these, until the next call. Raises UnsupportedModel, InvalidInput."""
        if len(loras) > self._limit:
            raise InvalidInput(
                f"{len(loras)} LoRAs at once are too many; {self._limit} at most", field="loras"
            )
        seen: Counter[tuple[Path, str]] = Counter()
        keys: dict[_Key, Lora] = {}
        for lora in loras:
            file = (lora.path, lora.weight_name)
            keys[*file, seen[file]] = lora
            seen[file] += 1
        named = [(self._name(key, lora, keep=keys), lora.scale) for key, lora in keys.items()]
        wanted = tuple((name, scale) for name, scale in named if name is not None)
        if wanted == self._active:
            return
        self._active = None
        set_adapter_layers(self._module, enabled=bool(wanted))
        if wanted:
            names, scales = [name for name, _ in wanted], [scale for _, scale in wanted]
            set_weights_and_activate_adapters(self._module, names, scales)
        self._active = wanted

    def _name(self, key: _Key, lora: Lora, keep: Iterable[_Key]) -> str | None:
        if key in self._loaded:
            self._loaded[key] = name = self._loaded.pop(key)
            return name
        while len(self._loaded) >= self._limit:
            oldest = next(other for other in self._loaded if other not in keep)
            name = self._loaded.pop(oldest)
            if name is not None:
                self._drop(name)
        self._loaded[key] = name = self._load(key, lora)
        return name

    def _load(self, key: _Key, lora: Lora) -> str | None:
        state, metadata = _state(lora)
        own = [value for name, value in state.items() if name.startswith(f"{self._prefix}.")]
        if not own:
            return None
        name = "l" + hashlib.sha256("\0".join(map(str, key)).encode()).hexdigest()[:16]
        self._active = None  # loading switches on what it loads
        try:
            if self._prefix == "transformer":
                SD3LoraLoaderMixin.load_lora_into_transformer(
                    state, self._module, adapter_name=name, metadata=metadata
                )
            else:
                SD3LoraLoaderMixin.load_lora_into_text_encoder(
                    state,
                    None,
                    self._module,
                    prefix=self._prefix,
                    adapter_name=name,
                    metadata=metadata,
                )
            # "auto" would ask the Hub for the base model's vocabulary.
            taken = get_peft_model_state_dict(
                self._module, adapter_name=name, save_embedding_layers=False
            )
            if _shapes(taken.values()) != _shapes(own):
                raise ValueError(f"it has layers that this {self._prefix} has not")
        except Exception as error:
            self._drop(name)
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                raise
            raise UnsupportedModel(
                f"LoRA {lora.name!r} does not fit this {self._prefix}: {first_line(error)}; it was "
                "trained for another architecture",
                field=f"loras.{lora.name}",
                reason="WrongArchitecture",
            ) from error
        return name

    def _drop(self, name: str) -> None:
        self._active = None  # PEFT switches on another adapter in the place of the dropped one
        delete_adapter_layers(self._module, name)
        getattr(self._module, "peft_config", {}).pop(name, None)


def _state(lora: Lora) -> tuple[dict[str, torch.Tensor], Any]:
    """The file's tensors, and the configuration that came with them."""
    field = f"loras.{lora.name}"
    file = _file_of(lora)
    open_whole(file, field)
    try:
        state, metadata = SD3LoraLoaderMixin.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"{file.name} cannot be read: {first_line(error)}", field=field, reason="BadWeights"
        ) from error
    parts = {key.partition(".")[0] for key in state}
    if not state or not parts <= _PREFIXES or not all("lora" in key for key in state):
        raise UnsupportedModel(
            f"{file.name} holds no LoRA of this family in diffusers' format, whose weights are "
            f"named {', '.join(f'{part}.…lora…' for part in sorted(_PREFIXES))}; convert it",
            field=field,
            reason="WrongArchitecture",
        )
    return state, metadata


def _shapes(tensors: Iterable[torch.Tensor]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tensor.shape) for tensor in tensors if tensor.ndim > 1)


def _file_of(lora: Lora) -> Path:
    if lora.path.is_file():
        files = [lora.path]
    elif lora.weight_name:
        files = [lora.path / lora.weight_name]
    else:
        files = sorted(lora.path.glob("*.safetensors"))
    if len(files) != 1 or not files[0].is_file() or files[0].suffix != ".safetensors":
        found = ", ".join(file.name for file in files) or "none"
        raise UnsupportedModel(
            f"LoRA {lora.name!r} must be one safetensors file, found {found} in {lora.path.name}; "
            "name it with `weightName`, and convert a pickle, which can run code",
            field=f"loras.{lora.name}",
            reason="NotSafetensors",
        )
    return files[0]
