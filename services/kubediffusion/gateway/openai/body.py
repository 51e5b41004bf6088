# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Reads the body of a request within bounds: of one body, of all bodies at once, and of time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, TypeVar

from fastapi import Request
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from kubediffusion.errors import Cancelled, InvalidInput, Overloaded
from kubediffusion.gateway.openai.errors import Refused
from kubediffusion.gateway.openai.fields import (
    MAX_COMMAS,
    EditFields,
    GenerationFields,
    invalid_input,
)

P = ParamSpec("P")
T = TypeVar("T")

# Work on fewer bytes than this takes less time than handing it to a thread.
_WORTH_A_THREAD = 64 * 1024
# How much of a body that is too large is read and thrown away, so that the client, which is still
# sending, gets to see why.
_DRAIN_BYTES = 64 << 20
_DRAIN_SECONDS = 5.0
_KEY = re.compile(r"([^\[\]]{1,64})((?:\[[^\[\]]{0,253}\]){0,3})", re.ASCII)


async def off_loop(nbytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`work`, in a thread when it is about so many bytes that the event loop would notice."""
    if nbytes < _WORTH_A_THREAD:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


class ByteBudget:
    """Bytes that all requests in flight may hold together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.used = 0

    def take(self, nbytes: int) -> None:
        if self.used + nbytes > self._limit:
            raise Overloaded(
                "the bodies of the requests in flight fill the gateway's memory; try again shortly",
                retry_after=1.0,
            )
        self.used += nbytes

    def give(self, nbytes: int) -> None:
        self.used -= nbytes


class BodyReader:
    """One request's body. What it took of the budget is given back by `close`."""

    def __init__(self, request: Request, budget: ByteBudget, *, limit: int, seconds: float) -> None:
        self._request = request
        self._budget = budget
        self._limit = limit
        self._seconds = seconds
        self.nbytes = 0

    def close(self) -> None:
        self._budget.give(self.nbytes)
        self.nbytes = 0

    async def generation(self) -> GenerationFields:
        self._check_media_type("application/json")
        raw = bytearray()
        async with self._patience():
            async for chunk in self._chunks():
                raw += chunk
        return await off_loop(len(raw), _parse_json, bytes(raw))

    async def edit(self) -> EditFields:
        self._check_media_type("multipart/form-data")
        async with self._patience():
            parser = _InMemoryParser(
                self._request.headers,
                self._chunks(),
                max_files=64,
                max_fields=256,
                max_part_size=self._limit,
            )
            parser.spool_max_size = self._limit + 1
            try:
                form = await parser.parse()
            except MultiPartException as error:
                raise InvalidInput(
                    f"the body is not multipart/form-data: {error.message}", reason="InvalidForm"
                ) from error
        return await off_loop(self.nbytes, _parse_form, form.multi_items())

    def _check_media_type(self, wanted: str) -> None:
        headers = self._request.headers
        given, options = parse_options_header(headers.get("content-type"))
        utf8 = options.get(b"charset", b"utf-8").lower() in (b"utf-8", b"utf8")
        plain = headers.get("content-encoding", "identity") == "identity"
        if given.decode("latin-1").lower() != wanted or not utf8 or not plain:
            raise Refused(
                f"send the body as {wanted}, in UTF-8 and not compressed",
                status=415,
                reason="UnsupportedMediaType",
            )

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        """The body; counted as it comes, whatever its headers say of its length."""
        stream = self._request.stream()
        try:
            async for chunk in stream:
                if self.nbytes + len(chunk) > self._limit:
                    await _drain(stream)
                    raise Refused(
                        f"the body is larger than {self._limit} bytes; send smaller images",
                        status=413,
                        reason="RequestTooLarge",
                    )
                self._budget.take(len(chunk))
                self.nbytes += len(chunk)
                yield chunk
        except ClientDisconnect:
            raise Cancelled("the client left before its request was read") from None

    @asynccontextmanager
    async def _patience(self) -> AsyncGenerator[None, None]:
        try:
            async with asyncio.timeout(self._seconds):
                yield
        except TimeoutError:
            raise Refused(
                f"the body did not arrive within {self._seconds:g} seconds",
                status=408,
                reason="RequestTimeout",
            ) from None


class _InMemoryParser(MultiPartParser):
    """Starlette's, with uploads kept in memory: they are bounded, and the file system of a pod may
    be read-only."""


async def _drain(stream: AsyncGenerator[bytes, None]) -> None:
    left = _DRAIN_BYTES
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for chunk in stream:
                left -= len(chunk)
                if left < 0:
                    return
    except TimeoutError:
        return


def _parse_json(raw: bytes) -> GenerationFields:
    if raw.count(b",") > MAX_COMMAS:
        raise InvalidInput("the body holds too many values", reason="InvalidJson")
    try:
        return GenerationFields.model_validate_json(raw, strict=True)
    except ValidationError as error:
        raise invalid_input(error, GenerationFields) from None


def _parse_form(items: list[tuple[str, str | UploadFile]]) -> EditFields:
    form: dict[str, Any] = {}
    for key, part in items:
        value = part if isinstance(part, str) else _contents(part)
        _nest(form, key, value)
    try:
        return EditFields.model_validate(form)
    except ValidationError as error:
        raise invalid_input(error, EditFields) from None


def _contents(upload: UploadFile) -> bytes:
    upload.file.seek(0)
    with upload.file:
        return upload.file.read()


def _nest(form: dict[str, Any], key: str, value: str | bytes) -> None:
    """Puts `control[edges][scale]` where it belongs; `image` and `image[]` gather a list."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise InvalidInput(f"the form has a malformed field name: {key[:64]!r}", field=key[:64])
    path = [match[1], *re.findall(r"\[([^\[\]]*)\]", match[2])]
    if path[-1] == "" or path == ["image"]:
        values = form.setdefault(path[0], [])
        if len(path) > 2 or not isinstance(values, list):
            raise InvalidInput("is given in two ways; send it once", field=path[0])
        values.append(value)
        return
    inner = form
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
        if not isinstance(inner, dict):
            raise InvalidInput("is given in two ways; send it once", field=path[0])
    if path[-1] in inner:
        raise InvalidInput("is given twice; send it once", field=".".join(path))
    inner[path[-1]] = value
