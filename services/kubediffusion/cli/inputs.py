# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a user typed, as the typed inputs of a workflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kubediffusion.errors import InvalidInput

MAX_FILE_BYTES = 64 * 1024 * 1024
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


@dataclass(frozen=True)
class Typed:
    """The options of `run` and `generate` that say what to draw."""

    prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    settings: Sequence[str] = ()  # NAME=VALUE
    loras: Sequence[str] = ()  # NAME=SCALE
    image: Path | None = None
    controls: Sequence[str] = ()  # NAME=FILE
    count: int = 1
    budget: float | None = None


def read_inputs(typed: Typed, types: Mapping[str, str]) -> dict[str, object]:
    """Every input under its name. `types` gives each input's type by name: text, integer, …

    Raises InvalidInput whose field is the option.
    """
    inputs: dict[str, object] = {}
    for setting in typed.settings:
        name, value = _split(setting, "--set", "NAME=VALUE")
        if name not in types:
            known = ", ".join(sorted(types))
            raise InvalidInput(f"no such input; the workflow has {known}", field=f"--set {name}")
        inputs[name] = _typed(value, types[name], f"--set {name}")
    direct = {"prompt": typed.prompt, "seed": typed.seed, "steps": typed.steps}
    inputs |= {name: value for name, value in direct.items() if value is not None}
    if typed.image is not None:
        inputs["image"] = _file(typed.image, "--image")
    for control in typed.controls:
        name, path = _split(control, "--control", "NAME=FILE")
        inputs[f"control.{name}"] = _file(Path(path), f"--control {name}")
    return inputs


def read_loras(typed: Typed) -> dict[str, float]:
    loras: dict[str, float] = {}
    for lora in typed.loras:
        name, scale = _split(lora, "--lora", "NAME=SCALE")
        loras[name] = _number(scale, f"--lora {name}")
    return loras


def read_replicas(given: Sequence[str]) -> dict[str, int]:
    replicas: dict[str, int] = {}
    for each in given:
        role, count = _split(each, "--replicas", "ROLE=N")
        replicas[role] = _integer(count, f"--replicas {role}")
    return replicas


def _split(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidInput(f"{text!r} is not of the form {form}", field=option)
    return name.strip(), value


def _typed(text: str, kind: str, field: str) -> object:
    """`@file` is a file's content: bytes for an image, otherwise its text."""
    if kind == "image":
        return _file(Path(text.removeprefix("@")), field)
    if text.startswith("@"):
        try:
            text = _file(Path(text[1:]), field).decode()
        except UnicodeDecodeError:
            raise InvalidInput(f"{text[1:]} is not UTF-8 text", field=field) from None
        text = text.removesuffix("\n")
    match kind:
        case "integer":
            return _integer(text, field)
        case "number":
            return _number(text, field)
        case "flag":
            return _flag(text, field)
        case _:
            return text


def _integer(text: str, field: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidInput(f"{text!r} is not a whole number", field=field) from None


def _number(text: str, field: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidInput(f"{text!r} is not a number", field=field) from None


def _flag(text: str, field: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE | _FALSE:
        raise InvalidInput(f"{text!r} is neither true nor false", field=field)
    return word in _TRUE


def _file(path: Path, field: str) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInput(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB", field=field)
        return path.read_bytes()
    except FileNotFoundError:
        raise InvalidInput(f"there is no file {path}", field=field) from None
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}", field=field) from None
