# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Events on the objects that a user looks at: few, and never in the way of the work."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from kubediffusion.errors import KubeDiffusionError
from kubediffusion_operator.planning.types import MANAGER, EventRecord, Object
from kubediffusion_operator.writing import Writer

# The same words about the same object are told again after so many seconds.
REPEAT_SECONDS = 600.0
# As client-go's filter against spam: a burst for each object, then one in so many seconds.
BURST = 25
REFILL_SECONDS = 300.0
# Objects and words that are remembered; the oldest are forgotten.
REMEMBERED = 4096
MAX_NOTE = 1024
# Events that wait to be posted; beyond these the oldest are dropped.
WAITING = 256
POSTS_AT_ONCE = 2

K = TypeVar("K")
V = TypeVar("V")

log = logging.getLogger(__name__)


class Recorder:
    """Posts beside whoever records: an API server that does not take events delays nothing else.

    `reporter` is this process, as events name it: the pod's name.
    """

    def __init__(
        self,
        writer: Writer,
        reporter: str,
        *,
        now: Callable[[], float],
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._writer = writer
        self._reporter = reporter
        self._now = now
        self._wall = wall
        self._told: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        self._budgets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._waiting: deque[tuple[str, Object]] = deque(maxlen=WAITING)
        self._posting: set[asyncio.Task[None]] = set()

    def record(self, namespace: str, event: EventRecord) -> bool:
        """Has it posted soon, unless it was told lately or too much was told of that object.

        An event that cannot be posted is dropped: conditions say the same, and last.
        """
        if not self._wanted(event):
            return False
        self._waiting.append((namespace, self._event(namespace, event)))
        if len(self._posting) < min(POSTS_AT_ONCE, len(self._waiting)):
            task = asyncio.create_task(self._post(), name="events")
            self._posting.add(task)
            task.add_done_callback(self._posting.discard)
        return True

    async def posted(self) -> None:
        """Returns when none is waiting."""
        while self._posting:
            await asyncio.wait(self._posting)

    async def stop(self) -> None:
        """What is not posted yet is not any more."""
        self._waiting.clear()
        for task in self._posting:
            task.cancel()
        await asyncio.gather(*self._posting, return_exceptions=True)

    async def _post(self) -> None:
        while self._waiting:
            namespace, event = self._waiting.popleft()
            try:
                await self._writer.post_event(namespace, event)
            except KubeDiffusionError as error:
                name = event["regarding"]["name"]
                log.info("event %s on %s: %s", event["reason"], name, error)
            except Exception:  # the others are posted all the same
                log.exception("event %s", event["reason"])

    def _wanted(self, event: EventRecord) -> bool:
        now = self._now()
        words = (event.about.uid, event.reason, event.message)
        last = self._told.get(words)
        if last is not None and now - last < REPEAT_SECONDS:
            return False
        tokens, since = self._budgets.get(event.about.uid, (float(BURST), now))
        tokens = min(float(BURST), tokens + (now - since) / REFILL_SECONDS)
        if tokens < 1:
            return False
        _remember(self._budgets, event.about.uid, (tokens - 1, now))
        _remember(self._told, words, now)
        return True

    def _event(self, namespace: str, event: EventRecord) -> Object:
        when = self._wall()
        about = event.about
        words = f"{about.uid} {event.reason} {event.message} {when.timestamp()}"
        suffix = hashlib.sha256(words.encode()).hexdigest()[:16]
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            # By its name the same event is not there twice when a call is repeated.
            "metadata": {"name": f"{about.name[:200]}.{suffix}", "namespace": namespace},
            "eventTime": when.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "reportingController": f"kubediffusion.io/{MANAGER}",
            "reportingInstance": self._reporter[:128],
            "type": event.type,
            "reason": event.reason[:128],
            "action": "Reconcile",
            "note": event.message[:MAX_NOTE],
            "regarding": {
                "apiVersion": about.api_version,
                "kind": about.kind,
                "name": about.name,
                "namespace": namespace,
                "uid": about.uid,
            },
        }


def _remember(memory: OrderedDict[K, V], key: K, value: V) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > REMEMBERED:
        memory.popitem(last=False)
