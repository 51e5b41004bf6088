# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Idempotency: which flight a key stands for, for a while after it ended and not for ever."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from kubediffusion.errors import Conflict
from kubediffusion.gateway.config import KeptResults
from kubediffusion.gateway.flights import Flight
from kubediffusion.v1alpha1 import gateway_pb2

# What a retry may change without being another request.
_INCIDENTAL = ("deadline_ms", "traceparent", "protocol", "priority", "weight")


@dataclass(slots=True)
class _Entry:
    body: bytes
    flight: Flight
    ended: float | None = None


class Results:
    """Flights by (tenant, idempotency key), bounded by age, number and bytes of images."""

    def __init__(self, limits: KeptResults, now: Callable[[], float]) -> None:
        self._limits = limits
        self._now = now
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._nbytes = 0

    def find(self, request: gateway_pb2.GenerateRequest) -> Flight | None:
        """The flight of an equal request with this key. Raises Conflict where it is another."""
        self._expire()
        entry = self._entries.get((request.tenant, request.idempotency_key))
        if entry is None:
            return None
        if entry.body != body_digest(request):
            raise Conflict(
                f"the key {request.idempotency_key!r} was used for another request; "
                "use a new key, or send the same request",
                field="idempotency_key",
            )
        return entry.flight

    def add(self, request: gateway_pb2.GenerateRequest, flight: Flight) -> None:
        key = (request.tenant, request.idempotency_key)
        self._entries[key] = _Entry(body_digest(request), flight)

    def ended(self, flight: Flight) -> None:
        """Keeps what succeeded. A failed request may be tried again under its key."""
        key = (flight.request.tenant, flight.request.idempotency_key)
        entry = self._entries.get(key)
        if entry is None or entry.flight is not flight:
            return
        if not flight.succeeded:
            del self._entries[key]
            return
        entry.ended = self._now()
        self._entries.move_to_end(key)
        self._nbytes += flight.nbytes
        self._expire()

    def _expire(self) -> None:
        limits, horizon = self._limits, self._now() - self._limits.seconds
        for key, entry in list(self._entries.items()):
            if entry.ended is None:
                continue  # under way: bounded by admission
            too_much = self._nbytes > limits.nbytes or len(self._entries) > limits.count
            if entry.ended > horizon and not too_much:
                break
            del self._entries[key]
            self._nbytes -= entry.flight.nbytes

    def __len__(self) -> int:
        return len(self._entries)


def body_digest(request: gateway_pb2.GenerateRequest) -> bytes:
    body = gateway_pb2.GenerateRequest()
    body.CopyFrom(request)
    for name in _INCIDENTAL:
        body.ClearField(name)
    return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()
