# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Every field that a request may have. docs/openai.md has the same lists for people; a test holds
the two and the installed `openai` package against each other."""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from kubediffusion.errors import InvalidInput

# Fields of OpenAI's that mean nothing here and do no harm; an answer names those it ignored.
IGNORED: Mapping[str, str] = {
    "quality": "the number of steps decides; send `steps`",
    "style": "describe the style in the prompt, or use a LoRA of the workflow",
    "moderation": "the gateway's own checks apply to every request",
    "complexity": "nothing is planned before the image is drawn",
    "input_fidelity": "send `strength`",
}
# Fields that would change what the caller gets, which an answer without them must not hide.
REFUSED: Mapping[str, str] = {
    "svg": "images are bitmaps: png, jpeg or webp",
    "frame_count": "animations are not made",
    "frame_duration_ms": "animations are not made",
    "markup": "draw the markup into the image, or send it as a control image",
}

# JSON of nothing but tiny values takes some thirty times its size in memory; a real request has
# a few dozen values, of which one may be a large image in base64, which has no commas.
MAX_COMMAS = 100_000

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_URL = re.compile(r"^data:[^,]{0,200};base64,")
_SIZE = re.compile(r"[1-9][0-9]{0,5}x[1-9][0-9]{0,5}", re.ASCII)


def decode_image(value: object) -> bytes:
    """The bytes of an image in a request: an uploaded file's, or base64, bare or in a data: URL.

    Nothing is ever fetched. Raises ValueError.
    """
    if isinstance(value, bytes):
        data = value
    elif not isinstance(value, str):
        raise ValueError("must be an image as base64 text")
    elif _URL.match(value):
        raise ValueError("is a URL, which this server does not fetch; send the image as base64")
    else:
        head = _DATA_URL.match(value)
        try:
            text = "".join((value[head.end() :] if head else value).split())
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("is not base64; send the image's bytes in base64") from None
    if not data:
        raise ValueError("is empty; send the bytes of an image")
    return data


def _check_size(value: str) -> str:
    if value != "auto" and not _SIZE.fullmatch(value):
        raise ValueError('must be "auto" or "WIDTHxHEIGHT", for example "512x512"')
    return value


ImageData = Annotated[
    bytes,
    PlainValidator(decode_image),
    WithJsonSchema({"type": "string", "contentEncoding": "base64"}),
]
Name = Annotated[str, Field(min_length=1, max_length=253)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Control(BaseModel):
    """A ControlNet's image and how strongly, and in which part of the steps, it acts."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    image: ImageData
    scale: float | None = None
    start: float | None = None
    end: float | None = None


class ImageFields(BaseModel):
    """What generations and edits have in common. Null means absent, as with OpenAI."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Annotated[str, Field(max_length=32_000)]
    model: Annotated[
        Name | None,
        Field(description="A workflow's name; may be left out where only one is served."),
    ] = None
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    size: Annotated[str, AfterValidator(_check_size)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    safety_identifier: Annotated[str, Field(max_length=256)] | None = None
    quality: Any = None
    complexity: Any = None
    svg: Any = None
    frame_count: Any = None
    frame_duration_ms: Any = None
    # Ours; the `openai` package sends them in `extra_body`.
    negative_prompt: Annotated[str, Field(max_length=32_000)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    steps: Count | None = None
    num_inference_steps: Annotated[Count | None, Field(description="The same as `steps`.")] = None
    guidance: float | None = None
    guidance_scale: Annotated[float | None, Field(description="The same as `guidance`.")] = None
    max_sequence_length: Count | None = None
    strength: float | None = None
    loras: Annotated[dict[Name, float], Field(max_length=64)] | None = None
    control: Annotated[dict[Name, Control], Field(max_length=16)] | None = None
    inputs: Annotated[
        dict[Name, Any] | None,
        Field(max_length=128, description="Any input that the workflow declares."),
    ] = None
    numerics: Literal["exact", "fast"] | None = None
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    deadline_ms: Annotated[int, Field(ge=1, le=86_400_000)] | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None

    @field_validator(*REFUSED, mode="before", check_fields=False)
    @classmethod
    def _refuse(cls, value: object, info: ValidationInfo) -> None:
        if value is not None:
            raise ValueError(f"is not supported: {REFUSED[info.field_name or '']}")

    @property
    def ignored(self) -> list[str]:
        """The fields that were sent and do nothing."""
        return sorted(name for name in IGNORED if getattr(self, name, None) is not None)


class GenerationFields(ImageFields):
    """The body of POST /v1/images/generations."""

    style: Any = None
    moderation: Any = None


class EditFields(ImageFields):
    """The form of POST /v1/images/edits."""

    image: Annotated[list[ImageData], Field(min_length=1, max_length=16)]
    mask: ImageData | None = None
    markup: Any = None
    input_fidelity: Any = None

    @field_validator("image", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return value if isinstance(value, list) else [value]

    @field_validator("loras", "control", "inputs", mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        """Forms nest as `loras[style]=0.5`; one JSON text is easier to type."""
        if not isinstance(value, str):
            return value
        if value.count(",") > MAX_COMMAS:
            raise ValueError("holds too many values")
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError('must be a JSON object, for example {"style": 0.5}') from None


def invalid_input(error: ValidationError, fields: type[BaseModel]) -> InvalidInput:
    """The first complaint of pydantic's, in words for the caller."""
    first = error.errors(include_url=False)[0]
    details = first.get("ctx", {})
    path = [str(part)[:64] for part in first["loc"]]
    field = ".".join(path)
    match first["type"]:
        case "json_invalid":
            return InvalidInput(f"the body is not JSON: {details['error']}", reason="InvalidJson")
        case "extra_forbidden":
            return _unknown(field, Control if len(path) > 1 else fields)
        case "missing":
            return InvalidInput(
                f"missing required parameter: {field!r}", field=field, reason="MissingParameter"
            )
        case "literal_error":
            why = {"background": "there is no transparency; "}.get(field, "")
            return InvalidInput(f"{why}must be {details['expected']}", field=field)
        case "value_error":
            return InvalidInput(str(details["error"]), field=field)
    return InvalidInput(first["msg"], field=field)


def _unknown(field: str, fields: type[BaseModel]) -> InvalidInput:
    name = field.rpartition(".")[2]
    close = difflib.get_close_matches(name, fields.model_fields, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "inputs of the workflow go under 'inputs'"
    return InvalidInput(
        f"unknown parameter: {field!r}; {hint}", field=field, reason="UnknownParameter"
    )
