# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Messages on their way to one node: grpc.aio allows one writer a stream, so they queue here."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import grpc.aio

from kubediffusion.v1alpha1 import node_pb2

# Releases are sent together: within this time, or when so many have come together.
RELEASE_DELAY = 0.1
RELEASE_BATCH = 64
# Requests to release on a node that is away. Its lease on them lapses anyway.
RELEASE_KEPT = 10_000


class Outbox:
    """Holds messages only while a stream is open, and releases also in between."""

    def __init__(self) -> None:
        self._messages: deque[node_pb2.WorkRequest] = deque()
        self._wake: asyncio.Future[None] | None = None
        self._idle: asyncio.Future[None] | None = None
        self._open = False
        self._releases: list[str] = []
        self._release_timer: asyncio.TimerHandle | None = None

    @property
    def pending_releases(self) -> int:
        return len(self._releases)

    def open(self) -> None:
        """A new stream: what was meant for an older one is of no use on it."""
        self._messages.clear()
        self._open = True
        self.flush_releases()

    def close(self) -> None:
        self._open = False
        self._messages.clear()
        self._cancel_timer()
        self._settle()

    def send(self, message: node_pb2.WorkRequest) -> None:
        if not self._open:
            return
        self._messages.append(message)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def release(self, request_id: str) -> None:
        """Sent with others, a little later; kept while there is no stream."""
        self._releases.append(request_id)
        if not self._open:
            if len(self._releases) > RELEASE_KEPT:
                del self._releases[0]
        elif len(self._releases) >= RELEASE_BATCH:
            self.flush_releases()
        elif self._release_timer is None:
            loop = asyncio.get_running_loop()
            self._release_timer = loop.call_later(RELEASE_DELAY, self.flush_releases)

    def flush_releases(self) -> None:
        self._cancel_timer()
        if self._releases and self._open:
            ids, self._releases = self._releases, []
            self.send(node_pb2.WorkRequest(release=node_pb2.Release(request_ids=ids)))

    async def write_to(self, call: Any) -> None:
        """The one writer of a stream; ends with it."""
        messages = self._messages
        loop = asyncio.get_running_loop()
        try:
            while True:
                while messages:
                    await call.write(messages.popleft())
                self._settle()
                self._wake = loop.create_future()
                await self._wake
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            call.cancel()  # the reader learns of it and says why
        finally:
            self._wake = None

    async def drained(self, seconds: float) -> None:
        """Waits until the last message is out, or the stream is gone, or the time is."""
        self.flush_releases()
        if not self._open or (not self._messages and self._wake is not None):
            return
        self._idle = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._idle], timeout=seconds)

    def _settle(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _cancel_timer(self) -> None:
        if self._release_timer is not None:
            self._release_timer.cancel()
            self._release_timer = None
