# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One request's inputs against a workflow: checked, completed, nothing left for a node to refuse
but what only the weights know. On the gateway's hot path."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import cast

from kubediffusion.api.load import did_you_mean
from kubediffusion.errors import InvalidInput, Unavailable
from kubediffusion.workflow.expression import MissingFactError
from kubediffusion.workflow.families import FAMILIES
from kubediffusion.workflow.graph import FromInputs, Node
from kubediffusion.workflow.values import (
    Bound,
    Facts,
    InputSpec,
    InputType,
    LoraUse,
    ResolvedWorkflow,
    Value,
)

MAX_LORA_SCALE = 10.0
# Control characters (line breaks and tabs are none here) and lone surrogates.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_INT64 = 1 << 63
_KINDS = {"bool": "a flag", "int": "a whole number", "float": "a number", "str": "text"}


def seed_from_key(key: str) -> int:
    """A request's seed where it names none: 0 to 2**32 - 1, the same for the same key."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:4], "big")


def bind(
    resolved: ResolvedWorkflow,
    inputs: Mapping[str, object],
    loras: Mapping[str, float] | None = None,
    facts: Facts | None = None,
    seed: int = 0,
) -> Bound:
    """Check and complete the inputs of one request.

    `seed` is taken where `inputs` has none. Without the facts of a model what depends on them is
    left to its node. Raises InvalidInput with field ``inputs.<name>`` or ``loras.<name>``, and
    Unavailable where a default waits for a fact that no node has told yet.
    """
    specs, facts = resolved.inputs, facts or {}
    for name in inputs:
        if name not in specs:
            hint = did_you_mean(name, specs)
            raise InvalidInput(
                f"workflow {resolved.name} has no such input; {hint}", field=f"inputs.{name}"
            )
    values: dict[str, Value] = {}
    for name, spec in specs.items():
        given = inputs.get(name)
        if given is not None:
            if spec.requires and not _there(specs, inputs, spec.requires):
                raise InvalidInput(
                    f"means nothing without {spec.requires}; give that too, or leave this out",
                    field=f"inputs.{name}",
                )
            values[name] = check_value(spec, given)
        elif not spec.requires or _there(specs, inputs, spec.requires):
            value = _default(resolved, spec, facts, seed)
            if value is not None:
                values[name] = value
    for node in resolved.graph.nodes:
        if node.stage == "denoise":
            _check_denoise(resolved, node, values, facts)
    return Bound(values, _loras(resolved, loras or {}))


def _there(specs: Mapping[str, InputSpec], inputs: Mapping[str, object], name: str) -> bool:
    return inputs.get(name) is not None or specs[name].default is not None


def _default(resolved: ResolvedWorkflow, spec: InputSpec, facts: Facts, seed: int) -> Value | None:
    if spec.default is not None:
        return spec.default
    if spec.name == "seed" and spec.type is InputType.INTEGER:
        return check_value(spec, seed)
    expression = resolved.graph.defaults.get(spec.name)
    if expression is not None:
        try:
            value = expression.evaluate({}, facts)
        except MissingFactError as missing:
            raise missing_fact(missing, f"inputs.{spec.name}") from None
        return None if value is None else check_value(spec, value)
    if spec.required:
        raise InvalidInput("is required", field=f"inputs.{spec.name}")
    return None


def missing_fact(missing: MissingFactError, field: str) -> Unavailable:
    role, name = missing.args
    return Unavailable(f"model {role} has not told its {name} yet; try again", field=field)


def check_value(spec: InputSpec, given: object) -> Value:
    """`given` in the type of the input, within its bounds. Raises InvalidInput."""
    match spec.type:
        case InputType.TEXT:
            return _text(spec, given)
        case InputType.INTEGER:
            if not isinstance(given, int) or isinstance(given, bool):
                raise _wrong(spec, given, "a whole number")
            if not -_INT64 <= given < _INT64:
                raise _error(spec, "is no 64-bit number")
            return _bounded(spec, given)
        case InputType.NUMBER:
            if not isinstance(given, (int, float)) or isinstance(given, bool):
                raise _wrong(spec, given, "a number")
            if not abs(given) < _INT64:  # NaN and infinities too
                raise _error(spec, f"{given} is no usable number")
            return _bounded(spec, float(given))
        case InputType.FLAG:
            if not isinstance(given, bool):
                raise _wrong(spec, given, "true or false")
            return given
        case InputType.IMAGE:
            return _image(spec, given)


def _error(spec: InputSpec, message: str) -> InvalidInput:
    return InvalidInput(message, field=f"inputs.{spec.name}")


def _wrong(spec: InputSpec, given: object, wanted: str) -> InvalidInput:
    name = type(given).__name__
    return _error(spec, f"must be {wanted}, not {_KINDS.get(name, name)}")


def _text(spec: InputSpec, given: object) -> str:
    if not isinstance(given, str):
        raise _wrong(spec, given, "text")
    if spec.max_length is not None and len(given) > spec.max_length:
        raise _error(spec, f"has {len(given)} characters; at most {spec.max_length} are taken")
    found = _CONTROL.search(given)
    if found:
        code = f"U+{ord(found[0]):04X}"
        raise _error(spec, f"has a control character ({code}) at {found.start()}; remove it")
    return given


def _bounded(spec: InputSpec, value: float) -> float:
    low, high = spec.minimum, spec.maximum
    if (low is not None and value < low) or (high is not None and value > high):
        if low is not None and high is not None:
            raise _error(spec, f"{value} is out of bounds; {low:g} to {high:g} is allowed")
        word, bound = ("least", low) if low is not None else ("most", high)
        raise _error(spec, f"{value} is out of bounds; at {word} {bound:g} is allowed")
    if spec.multiple_of is not None and value % spec.multiple_of:
        nearest = max(1, round(value / spec.multiple_of)) * spec.multiple_of
        raise _error(spec, f"{value} is not a multiple of {spec.multiple_of}; use {nearest}")
    return value


def _image(spec: InputSpec, given: object) -> bytes:
    if not isinstance(given, (bytes, bytearray, memoryview)):
        raise _wrong(spec, given, "the bytes of an image file")
    data = given if isinstance(given, bytes) else bytes(cast(bytearray, given))
    if not data:
        raise _error(spec, "is empty; give the bytes of a PNG or JPEG file")
    if spec.max_length is not None and len(data) > spec.max_length:
        raise _error(spec, f"has {len(data)} bytes; at most {spec.max_length} are taken")
    return data


def _check_denoise(
    resolved: ResolvedWorkflow, node: Node, values: Mapping[str, Value], facts: Facts
) -> None:
    """Checks of the family, on what the denoiser's ports will be given."""
    given: dict[str, Value] = {}
    names: dict[str, str] = {}
    for port, feed in node.inputs:
        if not isinstance(feed, FromInputs):
            continue
        name = feed.choose(values)
        if name is not None:
            given[port] = values[name]
            names[port] = name
    FAMILIES[resolved.family].check(given, names, facts)


def _loras(resolved: ResolvedWorkflow, given: Mapping[str, float]) -> tuple[LoraUse, ...]:
    for name, scale in given.items():
        field = f"loras.{name}"
        if name not in resolved.loras:
            hint = did_you_mean(name, resolved.loras)
            raise InvalidInput(f"the workflow declares no such LoRA; {hint}", field=field)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidInput("a LoRA's scale must be a number", field=field)
        if not abs(scale) <= MAX_LORA_SCALE:
            message = (
                f"{scale} is out of bounds; -{MAX_LORA_SCALE:g} to {MAX_LORA_SCALE:g} is allowed"
            )
            raise InvalidInput(message, field=field)
    if not resolved.loras:
        return ()
    scales = {name: float(given.get(name, decl.scale)) for name, decl in resolved.loras.items()}
    return tuple(
        LoraUse(d.name, d.uri, d.revision, scales[d.name], d.subfolder, d.weight_name)
        for d in resolved.loras.values()
        if scales[d.name]
    )
