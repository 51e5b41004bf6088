# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What was asked for in OpenAI's words, as the gateway's GenerateRequest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kubediffusion.errors import InvalidInput, KubeDiffusionError, NotFound
from kubediffusion.gateway.openai.fields import EditFields, ImageFields, decode_image
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2, tensor_pb2

# Fields that are an input of the workflow under the same or another name.
_INPUT_OF = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "steps": "steps",
    "num_inference_steps": "steps",
    "guidance": "guidance",
    "guidance_scale": "guidance",
    "max_sequence_length": "max_sequence_length",
    "strength": "strength",
}
_NUMERICS = {
    None: node_pb2.NUMERICS_UNSPECIFIED,
    "exact": node_pb2.NUMERICS_EXACT,
    "fast": node_pb2.NUMERICS_FAST,
}
_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True)
class Output:
    """How the caller wants the images back."""

    format: Literal["png", "jpeg", "webp"] = "png"
    quality: int = 100
    by_url: bool = False
    stream: bool = False


@dataclass(frozen=True)
class Caller:
    """What the headers of a request say."""

    tenant: str = ""
    idempotency_key: str = ""
    traceparent: str = ""


@dataclass(frozen=True)
class Call:
    """One request, ready to go."""

    request: gateway_pb2.GenerateRequest
    output: Output
    ignored: tuple[str, ...]
    # The gateway's name of an input -> the caller's field.
    origins: Mapping[str, str]

    def in_callers_words(self, error: KubeDiffusionError) -> KubeDiffusionError:
        """`error` naming the field that the caller sent."""
        error.field = self.origins.get(error.field, error.field)
        return error


def find_workflow(
    workflows: Sequence[gateway_pb2.WorkflowInfo], model: str | None
) -> gateway_pb2.WorkflowInfo:
    """The workflow that a request means by `model`; without one, the only one there is."""
    names = sorted(workflow.name for workflow in workflows)
    if model is None:
        if len(workflows) == 1:
            return workflows[0]
        raise InvalidInput(
            f"missing required parameter: 'model'; this server has {_listed(names)}",
            field="model",
            reason="MissingParameter",
        )
    for workflow in workflows:
        if workflow.name == model:
            return workflow
    raise NotFound(
        f"the model {model[:64]!r} does not exist; this server has {_listed(names)}",
        field="model",
        reason="ModelNotFound",
    )


def build_call(fields: ImageFields, workflow: gateway_pb2.WorkflowInfo, caller: Caller) -> Call:
    """Raises InvalidInput for what can be seen without knowing the models: fields that do not go
    together and values of inputs that cannot be told."""
    output = _output(fields)
    inputs = _Inputs({info.name: info.type for info in workflow.inputs})
    for field, name in _INPUT_OF.items():
        inputs.put(name, getattr(fields, field), field)
    if fields.size not in (None, "auto"):
        width, _, height = fields.size.partition("x")
        inputs.put("width", int(width), "size")
        inputs.put("height", int(height), "size")
    for name, control in (fields.control or {}).items():
        inputs.put(f"control.{name}", control.image, f"control.{name}.image")
        for part in ("scale", "start", "end"):
            field = f"control.{name}.{part}"
            inputs.put(field, getattr(control, part), field)
    if isinstance(fields, EditFields):
        _put_edit(inputs, fields)
    for name, value in (fields.inputs or {}).items():
        inputs.put_declared(name, value, textual=isinstance(fields, EditFields))
    request = gateway_pb2.GenerateRequest(
        workflow=workflow.name,
        inputs=inputs.values,
        loras=fields.loras or {},
        n=fields.n or 1,
        deadline_ms=fields.deadline_ms,
        idempotency_key=caller.idempotency_key,
        tenant=caller.tenant or fields.safety_identifier or fields.user or "",
        priority=fields.priority or 0,
        numerics=_NUMERICS[fields.numerics],
        budget=fields.budget,
        previews=fields.partial_images or 0,
        traceparent=caller.traceparent,
    )
    origins = {"workflow": "model", "previews": "partial_images"}
    origins |= {f"inputs.{name}": field for name, field in inputs.origins.items()}
    return Call(request, output, tuple(fields.ignored), origins)


def _output(fields: ImageFields) -> Output:
    if fields.partial_images and not fields.stream:
        raise InvalidInput(
            "partial images come in a stream; send stream=true as well", field="partial_images"
        )
    if fields.stream and fields.response_format == "url":
        raise InvalidInput(
            'a stream carries the images themselves; use "b64_json"', field="response_format"
        )
    form = fields.output_format or "png"
    if form == "png" and fields.output_compression not in (None, 100):
        raise InvalidInput(
            "png is lossless; set output_format to jpeg or webp", field="output_compression"
        )
    return Output(
        format=form,
        quality=100 if fields.output_compression is None else fields.output_compression,
        by_url=fields.response_format == "url",
        stream=bool(fields.stream),
    )


def _put_edit(inputs: _Inputs, fields: EditFields) -> None:
    if len(fields.image) > 1:
        raise InvalidInput(
            f"one image can be edited at a time, and {len(fields.image)} were sent", field="image"
        )
    if fields.mask is not None and "mask" not in inputs.types:
        raise InvalidInput(
            "this model repaints the whole image and takes no mask; send the image alone, with "
            "strength",
            field="mask",
        )
    inputs.put("image", fields.image[0], "image")
    inputs.put("mask", fields.mask, "mask")


class _Inputs:
    """Inputs as they are gathered; each may be set once."""

    def __init__(self, types: Mapping[str, str]) -> None:
        self.types = types
        self.values: dict[str, tensor_pb2.Value] = {}
        self.origins: dict[str, str] = {}

    def put(self, name: str, value: object, field: str) -> None:
        """Takes a value of the right type already. None is left out."""
        if value is None:
            return
        if name in self.values:
            raise InvalidInput(f"says the same as {self.origins[name]}; send one", field=field)
        self.values[name] = _to_value(value, field)
        self.origins[name] = field

    def put_declared(self, name: str, value: object, *, textual: bool) -> None:
        """Takes what came under `inputs`, read as the type that the workflow declares."""
        field = f"inputs.{name}"
        kind = self.types.get(name)
        if isinstance(value, bytes) and kind != "image":
            raise InvalidInput("is no image; send it as text, not as a file", field=field)
        if kind == "image" and value is not None:
            try:
                value = decode_image(value)
            except ValueError as error:
                raise InvalidInput(str(error), field=field) from None
        elif textual and isinstance(value, str):
            value = _read_text(value, kind, field)
        self.put(name, value, field)


def _read_text(text: str, kind: str | None, field: str) -> object:
    """A form has text only, which is read as the declared type."""
    try:
        if kind == "integer":
            return int(text)
        if kind == "number":
            return float(text)
        if kind == "flag":
            return {"true": True, "false": False}[text]
    except (ValueError, KeyError):
        raise InvalidInput(f"must be of type {kind}", field=field) from None
    return text


def _to_value(value: object, field: str) -> tensor_pb2.Value:
    match value:
        case str() if _is_unicode(value):
            return tensor_pb2.Value(text=value)
        case bool():
            return tensor_pb2.Value(flag=value)
        case int() if value in _INT64:
            return tensor_pb2.Value(integer=value)
        case float() if math.isfinite(value):
            return tensor_pb2.Value(number=value)
        case bytes():
            return tensor_pb2.Value(blob=value)
    raise InvalidInput("must be text, a number, true or false, or an image in base64", field=field)


def _is_unicode(text: str) -> bool:
    """False for halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + more if names else "none yet"
