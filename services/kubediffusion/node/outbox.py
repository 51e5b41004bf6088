# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What waits to be written to one gateway: a stream has one writer, and it may be slow."""

from __future__ import annotations

import asyncio
from collections import deque

from kubediffusion.v1alpha1 import node_pb2

# Beyond this many waiting events the stream's reader waits too: who does not listen is not heard.
HIGH_WATER = 1024

Slot = tuple[str, ...]


class Outbox:
    """Events in order. Of those that replace each other, only the latest waits.

    Progress, previews and checkpoints of a task, and load reports, each have a slot: a newer one
    takes the place of one that was not written yet. The rest are a few for each task, so what waits
    here is bounded by the number of tasks.
    """

    def __init__(self) -> None:
        self._order: deque[node_pb2.WorkEvent | Slot] = deque()
        self._slots: dict[Slot, node_pb2.WorkEvent] = {}
        self._wake: asyncio.Future[None] | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False
        self._error: Exception | None = None

    def send(self, event: node_pb2.WorkEvent) -> None:
        if not self._closed:
            self._append(event)

    def replace(self, slot: Slot, event: node_pb2.WorkEvent) -> None:
        if self._closed:
            return
        waits = slot in self._slots
        self._slots[slot] = event
        if not waits:
            self._append(slot)

    def close(self, error: Exception | None = None) -> None:
        """What waits is still written; then `next` returns None, or raises `error`."""
        if not self._closed:
            self._closed, self._error = True, error
            self._room.set()
            self._notify()

    async def next(self) -> node_pb2.WorkEvent | None:
        while not self._order:
            if self._closed:
                if self._error is not None:
                    raise self._error
                return None
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        item = self._order.popleft()
        if len(self._order) < HIGH_WATER:
            self._room.set()
        return self._slots.pop(item) if isinstance(item, tuple) else item

    @property
    def crowded(self) -> bool:
        return not self._room.is_set()

    async def room(self) -> None:
        """Waits until no more than HIGH_WATER events wait."""
        await self._room.wait()

    @property
    def closed(self) -> bool:
        return self._closed

    def __len__(self) -> int:
        return len(self._order)

    def _append(self, item: node_pb2.WorkEvent | Slot) -> None:
        self._order.append(item)
        if len(self._order) >= HIGH_WATER:
            self._room.clear()
        self._notify()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
