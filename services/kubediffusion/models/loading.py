# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Loading a component: safetensors only, whole, and of the architecture that it claims to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kubediffusion.errors import UnsupportedModel
from kubediffusion.models.base import LoadSpec

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_SHOWN_KEYS = 4


def torch_dtype(name: str) -> torch.dtype:
    """Raises UnsupportedModel for a dtype that models are not loaded in."""
    try:
        return _DTYPES[name or "float32"]
    except KeyError:
        known = ", ".join(_DTYPES)
        raise UnsupportedModel(
            f"{name!r} is no dtype to load a model in; use one of {known}",
            field="dtype",
            reason="UnsupportedDType",
        ) from None


def config_of(spec: LoadSpec) -> dict[str, Any]:
    """The component's config.json."""
    file = spec.path / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise UnsupportedModel(
            f"{spec.path} has no config.json: it is no component in diffusers' layout",
            reason="WrongArchitecture",
        ) from None
    except ValueError as error:
        raise UnsupportedModel(f"{file}: {error}; fetch it again", reason="BadWeights") from None
    if not isinstance(config, dict):
        raise UnsupportedModel(f"{file} is no JSON object", reason="WrongArchitecture")
    return config


def check_class(spec: LoadSpec, accepted: Sequence[str]) -> None:
    """Raises UnsupportedModel where config.json names another architecture."""
    config = config_of(spec)
    names = [config["_class_name"]] if "_class_name" in config else config.get("architectures", [])
    if names and not set(names) & set(accepted):
        raise UnsupportedModel(
            f"{spec.path} holds a {names[0]}, where family {spec.family} needs a "
            f"{' or '.join(accepted)} as its {spec.component}; check the source and subfolder",
            reason="WrongArchitecture",
        )


def check_weights(folder: Path, variant: str = "") -> None:
    """Raises UnsupportedModel unless there are safetensors here, and each opens whole."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in _PICKLES]
        what = f"only pickles ({', '.join(pickles)})" if pickles else "no weights"
        raise UnsupportedModel(
            f"{folder} has {what}; only safetensors are loaded, as a pickle can run code. Convert "
            "it with `save_pretrained(..., safe_serialization=True)`",
            reason="NotSafetensors",
        )
    # Of one file, or of many: model.fp16.safetensors, model.fp16-00001-of-00002.safetensors.
    marks = (f".{variant}.", f".{variant}-")
    if variant and not any(mark in file.name for file in files for mark in marks):
        raise UnsupportedModel(
            f"{folder} has no weights of variant {variant!r}; leave `variant` out or fix it",
            field="variant",
            reason="WrongArchitecture",
        )
    for file in files:
        open_whole(file)


def open_whole(file: Path, field: str = "") -> None:
    """Raises UnsupportedModel for a file that is torn or no safetensors file."""
    try:
        with safe_open(file, framework="pt") as weights:
            weights.keys()
    except (SafetensorError, OSError) as error:
        raise UnsupportedModel(
            f"{file.name} is no whole safetensors file: {error}; fetch it again",
            field=field,
            reason="BadWeights",
        ) from error


def load_module(spec: LoadSpec, cls: Any, accepted: Sequence[str] = ()) -> Any:
    """`cls.from_pretrained` in the spec's dtype, on its device, in eval mode.

    A key too few or too many is an error: transformers would draw the missing weights at random
    and say so in a log line only. Raises UnsupportedModel.
    """
    check_class(spec, accepted or (cls.__name__,))
    check_weights(spec.path, spec.variant)
    dtype = torch_dtype(spec.dtype)
    is_diffusers = hasattr(cls, "load_config")
    try:
        module, info = cls.from_pretrained(
            spec.path,
            local_files_only=True,
            use_safetensors=True,
            variant=spec.variant or None,
            output_loading_info=True,
            **({"torch_dtype": dtype} if is_diffusers else {"dtype": dtype}),
        )
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise  # not the weights' fault
        raise UnsupportedModel(
            f"{spec.path} does not load as a {cls.__name__}: {first_line(error)}; its weights "
            "and its config.json do not belong together",
            reason="WrongArchitecture",
        ) from error
    _check_info(spec, cls.__name__, info)
    return module.to(spec.device).eval().requires_grad_(False)


def _check_info(spec: LoadSpec, cls: str, info: Any) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in (info.get(kind) or ()))
        if keys:
            more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
            raise UnsupportedModel(
                f"{spec.path}: {kind.replace('_', ' ')} for a {cls}: "
                f"{', '.join(keys[:_SHOWN_KEYS])}{more}; these are weights of another architecture",
                reason="WrongArchitecture",
            )


def nbytes_of(module: torch.nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def first_line(error: BaseException) -> str:
    """Of an error's text, for a message of ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
