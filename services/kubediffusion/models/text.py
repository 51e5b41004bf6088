# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Text encoders of Stable Diffusion 3: two CLIPs and a T5, each a model of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

from kubediffusion.errors import InvalidInput, UnsupportedModel
from kubediffusion.models.base import LoadSpec, Lora, PortValue
from kubediffusion.models.loading import first_line, load_module, nbytes_of
from kubediffusion.models.lora import Adapters


def _tokenizer(spec: LoadSpec, cls: Any, component: str) -> Any:
    """`text_encoder_2` has its tokenizer in `tokenizer_2`, beside it in the pipeline."""
    folder = spec.pipeline_path / component.replace("text_encoder", "tokenizer")
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"{folder} has no tokenizer for {spec.component}: {first_line(error)}",
            reason="WrongArchitecture",
        ) from error


def _text(inputs: Mapping[str, PortValue]) -> str:
    text = inputs.get("text")
    if not isinstance(text, str):
        raise InvalidInput("stage 'encode' takes a text", field="text")
    return text


def _token_ids(tokenizer: Any, text: str, length: int, *, cut: bool = False) -> torch.Tensor:
    """(1, length), padded. Raises InvalidInput for a text that would have to be cut.

    diffusers cuts it and logs the loss; a service that draws half of what was asked for would
    only hide the mistake. `cut` is for an encoder that need not read to the end.
    """
    if not cut and (needed := _tokens(tokenizer, text)) > length:
        raise InvalidInput(
            f"the prompt has {needed} tokens and this text encoder takes {length}; shorten it",
            field="text",
            reason="PromptTooLong",
        )
    return tokenizer(
        [text], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def _tokens(tokenizer: Any, text: str) -> int:
    """How many it has, marks included."""
    return len(tokenizer(text, truncation=False, verbose=False).input_ids)


def _has_t5(spec: LoadSpec) -> bool:
    try:
        index = json.loads((spec.pipeline_path / "model_index.json").read_text())
        return bool(index["text_encoder_3"][1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False


class ClipEncoder:
    """`encode`: text -> `embeds` (1, T, D), the last hidden state but one; `pooled` (1, P).

    Beside a T5, which reads several times as far, a CLIP takes the beginning of a long prompt, as
    in diffusers, and warns of it; alone it refuses one.
    """

    stages = ("encode",)

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self._module = load_module(spec, CLIPTextModelWithProjection)
        self._tokenizer = _tokenizer(spec, CLIPTokenizer, spec.component)
        # Both CLIPs pad to the first one's length, as the pipeline does.
        first = _tokenizer(spec, CLIPTokenizer, "text_encoder")
        self._length = min(first.model_max_length, self._module.config.max_position_embeddings)
        self._cut = _has_t5(spec)
        self._adapters = Adapters(self._module, spec.component)

    @property
    def facts(self) -> Mapping[str, str | int | float | bool]:
        return {"max_length": self._length}

    @property
    def nbytes(self) -> int:
        return nbytes_of(self._module)

    def run(
        self, stage: str, inputs: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> Mapping[str, PortValue]:
        ids = _token_ids(self._tokenizer, _text(inputs), self._length, cut=self._cut)
        warnings = self._warnings(_text(inputs)) if self._cut else []
        self._adapters.use(loras)
        with torch.inference_mode():
            out = self._module(ids.to(self._module.device), output_hidden_states=True)
        embeds = out.hidden_states[-2].to(self._module.dtype)
        return {"embeds": embeds, "pooled": out[0], "warnings": warnings}

    def _warnings(self, text: str) -> list[PortValue]:
        """That the end of a prompt is not read here; the same of both CLIPs."""
        # A token is a byte at least, and most prompts need not be counted.
        if len(text.encode()) <= self._length - 2:
            return []
        needed = _tokens(self._tokenizer, text)
        if needed <= self._length:
            return []
        return [
            f"the prompt has {needed} CLIP tokens: the CLIP encoders read the first "
            f"{self._length}, as in diffusers, and only the T5 encoder reads all of it"
        ]

    def unload(self) -> None:
        del self._module, self._adapters


class T5Encoder:
    """`encode`: text and `max_length` -> `embeds` (1, max_length, D)."""

    stages = ("encode",)

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self._module = load_module(spec, T5EncoderModel)
        self._tokenizer = _tokenizer(spec, AutoTokenizer, spec.component)

    @property
    def facts(self) -> Mapping[str, str | int | float | bool]:
        return {"max_length": 512}

    @property
    def nbytes(self) -> int:
        return nbytes_of(self._module)

    def run(
        self, stage: str, inputs: Mapping[str, PortValue], loras: Sequence[Lora] = ()
    ) -> Mapping[str, PortValue]:
        length = inputs.get("max_length", 256)
        if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= 512:
            raise InvalidInput("it must be within 1 and 512 tokens", field="max_length")
        ids = _token_ids(self._tokenizer, _text(inputs), length)
        with torch.inference_mode():
            embeds = self._module(ids.to(self._module.device))[0]
        return {"embeds": embeds.to(self._module.dtype)}

    def unload(self) -> None:
        del self._module
