# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Follows a request while its client is there: to all its images, or event by event."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from typing import TypeVar

from fastapi import Response
from starlette.types import Message, Receive, Scope, Send

from kubediffusion.errors import Cancelled, Internal, KubeDiffusionError
from kubediffusion.gateway.openai.body import off_loop
from kubediffusion.gateway.openai.errors import error_body
from kubediffusion.gateway.openai.requests import Call
from kubediffusion.gateway.openai.responses import (
    Operation,
    completed_event,
    partial_event,
    sse,
    work,
)
from kubediffusion.v1alpha1 import gateway_pb2

T = TypeVar("T")
Events = AsyncGenerator[gateway_pb2.GenerateEvent, None]

log = logging.getLogger(__name__)

# A comment, which readers of server-sent events skip; proxies see that the connection lives.
_KEEPALIVE = b": waiting\n\n"


async def until_gone(receive: Receive, doing: Awaitable[T]) -> T:
    """The result of `doing`, which is cancelled, and Cancelled raised, when the client leaves.

    The body of the request must have been read.
    """
    task = asyncio.ensure_future(doing)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("the client left, so the request was cancelled")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def collect(call: Call, events: Events) -> tuple[str, list[gateway_pb2.Image]]:
    """The gateway's id of the request and its images, in their order."""
    images: dict[int, gateway_pb2.Image] = {}
    request_id = ""
    async for event in events:
        request_id = request_id or event.request_id
        if event.HasField("image"):
            images[event.index] = event.image
    _check_complete(call, len(images))
    return request_id, [image for _, image in sorted(images.items())]


async def event_chunks(
    call: Call, operation: Operation, first: gateway_pb2.GenerateEvent, events: Events
) -> AsyncGenerator[bytes, None]:
    """The server-sent events of a request. The status has gone out: errors are events, too."""
    try:
        previews: Counter[int] = Counter()
        images = 0
        event: gateway_pb2.GenerateEvent | None = first
        while event is not None:
            index = event.index
            if event.HasField("preview"):
                picture, number = event.preview, previews[index]
                previews[index] += 1
                yield await off_loop(
                    work([picture], call.output),
                    partial_event, operation, picture, call.output, of=index, number=number,
                )  # fmt: skip
            elif event.HasField("image"):
                images += 1
                yield await off_loop(
                    work([event.image], call.output),
                    completed_event, operation, event.image, call.output, of=index,
                )  # fmt: skip
            event = await anext(events, None)
        _check_complete(call, images)
    except KubeDiffusionError as error:
        yield sse({"type": "error"} | error_body(call.in_callers_words(error)))
    except Exception:
        log.exception("a stream of images failed")
        error = Internal("the server failed at this request; its log says why")
        yield sse({"type": "error"} | error_body(error))


class EventStream(Response):
    """Sends chunks while the client is there, then closes their generator and `events`."""

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        events: Events,
        *,
        headers: Mapping[str, str],
        keepalive_seconds: float,
        send_seconds: float,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        # init_headers adds the length of a body, and this one has none yet.
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._chunks = chunks
        self._events = events
        self._keepalive_seconds = keepalive_seconds
        self._send_seconds = send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._pump(send))
        except (Cancelled, TimeoutError) as error:
            # Nobody is there to be told.
            log.info("a stream ended early: %s", error or "the client stopped reading")
        finally:
            await self._chunks.aclose()
            await self._events.aclose()

    async def _pump(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        async with aclosing(_keep_alive(self._chunks, self._keepalive_seconds)) as chunks:
            async for chunk in chunks:
                await self._send(send, {"body": chunk, "more_body": True})
        await self._send(send, {"body": b"", "more_body": False})

    async def _send(self, send: Send, message: Message) -> None:
        """A client that does not read must not hold a request's resources for good."""
        async with asyncio.timeout(self._send_seconds):
            await send({"type": "http.response.body", **message})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _keep_alive(
    chunks: AsyncGenerator[bytes, None], seconds: float
) -> AsyncGenerator[bytes, None]:
    """`chunks`, and a comment whenever none has come for so many seconds."""
    pending: asyncio.Future[bytes | None] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(anext(chunks, None))
            while not (await asyncio.wait({pending}, timeout=seconds))[0]:
                yield _KEEPALIVE
            chunk = pending.result()
            if chunk is None:
                return
            yield chunk
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.wait({pending})


def _check_complete(call: Call, images: int) -> None:
    if images != call.request.n:
        raise Internal(f"the gateway made {images} of {call.request.n} images and said no more")
