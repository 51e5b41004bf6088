# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which namespaces are to be looked at: a mark each, however much happened there."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from kubediffusion.errors import KubeDiffusionError

log = logging.getLogger(__name__)

BACKOFF_FIRST = 0.5
BACKOFF_MOST = 10.0


class Queue:
    """Calls `reconcile` for marked namespaces: never twice at once for one, and some at a time.

    `reconcile` returns after how many seconds it wants to be called again though nothing happens,
    or None. Where it raises, the namespace rests for a bounded, jittered back-off that no event
    cuts short, so that an API server in trouble is not asked more often than others ask it.
    """

    def __init__(
        self,
        reconcile: Callable[[str], Awaitable[float | None]],
        *,
        debounce: float = 0.1,
        at_once: int = 4,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._reconcile = reconcile
        self._debounce = debounce
        self._jitter = jitter
        self._slots = asyncio.Semaphore(at_once)
        self._marks: dict[str, asyncio.Event] = {}
        self._workers: dict[str, asyncio.Task[None]] = {}
        self._alarms: dict[str, asyncio.TimerHandle] = {}
        self._closed = False

    def mark(self, namespace: str) -> None:
        if self._closed:
            return
        mark = self._marks.setdefault(namespace, asyncio.Event())
        mark.set()
        worker = self._workers.get(namespace)
        if worker is None or worker.done():
            self._workers[namespace] = asyncio.create_task(
                self._work(namespace, mark), name=f"namespace {namespace}"
            )

    @property
    def depth(self) -> int:
        """Namespaces that wait."""
        return sum(mark.is_set() for mark in self._marks.values())

    @property
    def idle(self) -> bool:
        """Nothing waits, nothing is under way."""
        return all(worker.done() for worker in self._workers.values())

    async def stop(self) -> None:
        self._closed = True
        for alarm in self._alarms.values():
            alarm.cancel()
        for worker in self._workers.values():
            worker.cancel()
        await asyncio.gather(*self._workers.values(), return_exceptions=True)

    async def _work(self, namespace: str, mark: asyncio.Event) -> None:
        failures = 0
        while mark.is_set():
            await asyncio.sleep(self._debounce)
            async with self._slots:
                mark.clear()
                self._disarm(namespace)
                try:
                    again = await self._reconcile(namespace)
                except Exception as error:
                    failures += 1
                    mark.set()
                    self._complain(namespace, error, failures)
                else:
                    failures = 0
                    if again is not None:
                        self._arm(namespace, again)
            if failures:
                await asyncio.sleep(self._pause(failures))
        # Nothing is awaited between the last look at the mark and the end of this task.
        self._marks.pop(namespace, None)
        self._workers.pop(namespace, None)

    def _arm(self, namespace: str, seconds: float) -> None:
        def ring() -> None:
            self._alarms.pop(namespace, None)
            self.mark(namespace)

        self._alarms[namespace] = asyncio.get_running_loop().call_later(seconds, ring)

    def _disarm(self, namespace: str) -> None:
        alarm = self._alarms.pop(namespace, None)
        if alarm is not None:
            alarm.cancel()

    def _pause(self, failures: int) -> float:
        longest = min(BACKOFF_FIRST * 2 ** min(failures - 1, 16), BACKOFF_MOST)
        return longest * (0.5 + 0.5 * self._jitter())

    @staticmethod
    def _complain(namespace: str, error: Exception, failures: int) -> None:
        expected = isinstance(error, KubeDiffusionError)
        log.log(
            logging.WARNING if failures == 1 or not expected else logging.DEBUG,
            "namespace %s: %s; trying again",
            namespace,
            error,
            exc_info=None if expected else error,
        )
