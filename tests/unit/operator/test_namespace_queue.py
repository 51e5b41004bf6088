# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest

from kubediffusion.errors import Unavailable
from kubediffusion_operator.queueing import BACKOFF_FIRST, BACKOFF_MOST, Queue
from tests.unit.operator.virtual_time import now, run

Reconcile = Callable[[str], Awaitable[float | None]]


class Record:
    """Notes when each namespace was reconciled; takes `seconds` each time."""

    def __init__(self, seconds: float = 0.0, answers: list[float | Exception] | None = None):
        self.calls: list[tuple[float, str]] = []
        self.running: dict[str, int] = {}
        self.most = 0
        self.together = 0
        self._seconds = seconds
        self._answers = list(answers or [])

    async def __call__(self, namespace: str) -> float | None:
        self.calls.append((round(now(), 3), namespace))
        self.running[namespace] = self.running.get(namespace, 0) + 1
        self.most = max(self.most, self.running[namespace])
        self.together = max(self.together, sum(self.running.values()))
        await asyncio.sleep(self._seconds)
        self.running[namespace] -= 1
        answer = self._answers.pop(0) if self._answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer


async def settle(queue: Queue) -> None:
    while not queue.idle:  # noqa: ASYNC110 (in virtual time)
        await asyncio.sleep(0.01)


def test_many_marks_within_the_pause_are_one_round() -> None:
    async def scenario() -> None:
        record = Record()
        queue = Queue(record, debounce=0.1)
        for _ in range(50):
            queue.mark("a")
        await asyncio.sleep(0.05)
        queue.mark("a")
        assert queue.depth == 1
        await settle(queue)
        assert record.calls == [(0.1, "a")]
        assert queue.depth == 0
        await queue.stop()

    run(scenario())


def test_a_mark_while_a_round_runs_brings_another_round_and_never_two_at_once() -> None:
    async def scenario() -> None:
        record = Record(seconds=5)
        queue = Queue(record, debounce=0.1)
        queue.mark("a")
        for _ in range(30):
            await asyncio.sleep(0.1)
            queue.mark("a")
        await settle(queue)
        assert record.most == 1
        assert [when for when, _ in record.calls] == [0.1, 5.2]
        await queue.stop()

    run(scenario())


def test_namespaces_run_beside_each_other_up_to_the_limit() -> None:
    async def scenario() -> None:
        record = Record(seconds=5)
        queue = Queue(record, debounce=0.1, at_once=3)
        for name in "abcdefg":
            queue.mark(name)
        await settle(queue)
        assert record.together == 3
        assert sorted(name for _, name in record.calls) == list("abcdefg")
        await queue.stop()

    run(scenario())


def test_a_round_may_ask_for_another_and_an_earlier_mark_takes_its_place() -> None:
    async def scenario() -> None:
        record = Record(answers=[60.0, 60.0])
        queue = Queue(record, debounce=0.1)
        queue.mark("a")
        await asyncio.sleep(59)
        assert len(record.calls) == 1
        await asyncio.sleep(2)
        assert record.calls[1] == (60.2, "a")
        await asyncio.sleep(20)
        queue.mark("a")
        await asyncio.sleep(100)
        # The mark's round asked for nothing, so the alarm of the round before is off.
        assert len(record.calls) == 3
        await queue.stop()

    run(scenario())


@pytest.mark.parametrize("error", [Unavailable("away"), ZeroDivisionError("a bug")])
def test_failures_back_off_up_to_a_bound_whatever_is_marked_meanwhile(error: Exception) -> None:
    async def scenario() -> None:
        record = Record(answers=[error] * 12)
        queue = Queue(record, debounce=0.0, jitter=lambda: 1.0)
        queue.mark("a")
        for _ in range(1000):
            await asyncio.sleep(0.1)
            queue.mark("a")
        times = [when for when, _ in record.calls[:12]]
        pauses = [round(b - a, 1) for a, b in itertools.pairwise(times)]
        assert pauses[:5] == [BACKOFF_FIRST, 1, 2, 4, 8]
        assert set(pauses[5:]) == {BACKOFF_MOST}
        await queue.stop()

    run(scenario())


def test_back_off_is_jittered_downwards_and_a_success_forgets_it() -> None:
    async def scenario() -> None:
        fail = Unavailable("away")
        record = Record(answers=[fail, fail, 0.0, fail])
        queue = Queue(record, debounce=0.0, jitter=lambda: 0.0)
        queue.mark("a")
        await settle(queue)
        await asyncio.sleep(1)
        times = [when for when, _ in record.calls]
        assert times == [0.0, 0.25, 0.75, 0.75, 1.0]
        await queue.stop()

    run(scenario())


def test_one_namespace_in_trouble_does_not_hold_the_others_up() -> None:
    async def scenario() -> None:
        calls: list[tuple[float, str]] = []

        async def reconcile(namespace: str) -> float | None:
            calls.append((now(), namespace))
            if namespace == "bad":
                raise Unavailable("away")
            return None

        queue = Queue(reconcile, debounce=0.0, at_once=1)
        queue.mark("bad")
        await asyncio.sleep(20)
        begin = now()
        queue.mark("good")
        await asyncio.sleep(0)
        await asyncio.sleep(0.1)
        assert [(when, name) for when, name in calls if name == "good"] == [(begin, "good")]
        await queue.stop()

    run(scenario())


def test_nothing_is_left_after_stop() -> None:
    async def scenario() -> None:
        record = Record(seconds=50)
        queue = Queue(record, debounce=0.1)
        queue.mark("a")
        await asyncio.sleep(1)
        await queue.stop()
        queue.mark("b")
        await asyncio.sleep(100)
        assert [name for _, name in record.calls] == ["a"]

    run(scenario())
