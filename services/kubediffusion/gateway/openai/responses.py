# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What the gateway made, as OpenAI's answer or as its server-sent events."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel

from kubediffusion.gateway.openai.requests import Output
from kubediffusion.v1alpha1 import gateway_pb2

Operation = Literal["image_generation", "image_edit"]


class ImageAnswer(BaseModel):
    """One image, with the seed that draws it again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int
    warnings: list[str] | None = None


class ImagesAnswer(BaseModel):
    """OpenAI's ImagesResponse."""

    created: int
    data: list[ImageAnswer]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    size: str


class ModelAnswer(BaseModel):
    """OpenAI's Model, and what the workflow behind it takes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kubediffusion"
    ready: bool
    message: str
    inputs: list[dict[str, Any]]
    loras: list[str]


class ModelsAnswer(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


def convert(png: bytes, output: Output) -> bytes:
    """The image in the format asked for. PNG goes out as the gateway made it, bit for bit."""
    if output.format == "png":
        return png
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        image.convert("RGB").save(buffer, format=output.format, quality=output.quality)
    return buffer.getvalue()


def convert_all(images: Sequence[gateway_pb2.Image], output: Output) -> list[bytes]:
    return [convert(image.png, output) for image in images]


def work(images: Sequence[gateway_pb2.Image], output: Output) -> int:
    """How many bytes an answer with these images is about: unpacked, where they are converted."""
    if output.format == "png":
        return sum(len(image.png) for image in images)
    return sum(3 * image.width * image.height for image in images)


def answer(
    images: Sequence[gateway_pb2.Image],
    output: Output,
    *,
    files: Sequence[bytes] = (),
    urls: Sequence[str] = (),
) -> bytes:
    """The JSON of an answer, with the images' files in it or their URLs."""
    if urls:
        data = [_answer(i, url=u) for i, u in zip(images, urls, strict=True)]
    else:
        pairs = zip(images, files, strict=True)
        data = [_answer(i, b64_json=_base64(file)) for i, file in pairs]
    whole = ImagesAnswer(
        created=int(time.time()), data=data, output_format=output.format, size=_size(images[0])
    )
    return whole.model_dump_json(exclude_none=True).encode()


def _answer(image: gateway_pb2.Image, **where: str) -> ImageAnswer:
    return ImageAnswer(seed=image.seed, warnings=list(image.warnings) or None, **where)


def partial_event(
    operation: Operation, image: gateway_pb2.Image, output: Output, *, of: int, number: int
) -> bytes:
    """The `number`th partial image of the `of`th image."""
    event = _event(f"{operation}.partial_image", image, output, of)
    return sse(event | {"partial_image_index": number, "step": image.step})


def completed_event(
    operation: Operation, image: gateway_pb2.Image, output: Output, *, of: int
) -> bytes:
    event = _event(f"{operation}.completed", image, output, of)
    # The type demands it; nothing here is counted in tokens.
    nothing = {"image_tokens": 0, "text_tokens": 0}
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    event |= {"seed": image.seed, "usage": usage | {"input_tokens_details": nothing}}
    return sse(event | ({"warnings": list(image.warnings)} if image.warnings else {}))


def sse(data: dict[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()


def _event(kind: str, image: gateway_pb2.Image, output: Output, image_index: int) -> dict[str, Any]:
    return {
        "type": kind,
        "b64_json": _base64(convert(image.png, output)),
        "created_at": int(time.time()),
        "size": _size(image),
        "quality": "auto",
        "background": "opaque",
        "output_format": output.format,
        "image_index": image_index,
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _size(image: gateway_pb2.Image) -> str:
    return f"{image.width}x{image.height}"
