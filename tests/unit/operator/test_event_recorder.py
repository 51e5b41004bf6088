# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from kubediffusion.errors import Unavailable
from kubediffusion_operator.events import (
    BURST,
    POSTS_AT_ONCE,
    REFILL_SECONDS,
    REPEAT_SECONDS,
    WAITING,
    Recorder,
)
from kubediffusion_operator.planning.types import EventRecord, Ref

ABOUT = Ref("kubediffusion.io/v1alpha1", "DiffusionWorkflow", "sd3", "u-1")


class Posts:
    def __init__(self) -> None:
        self.posted: list[dict[str, Any]] = []
        self.fail = False
        self.gate: asyncio.Event | None = None
        self.tried = 0
        self.now = 0.0
        wall = datetime(2026, 1, 31, 12, 0, 0, 5, tzinfo=UTC)
        self.recorder = Recorder(self, "pod-1", now=lambda: self.now, wall=lambda: wall)  # pyright: ignore[reportArgumentType]

    async def post_event(self, namespace: str, event: dict[str, Any]) -> None:
        self.tried += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.fail:
            raise Unavailable("no")
        self.posted.append(event)

    async def record(self, message: str = "m", about: Ref = ABOUT, reason: str = "R") -> bool:
        """Whether it was posted."""
        before = len(self.posted)
        self.recorder.record("ns", EventRecord(about, "Warning", reason, message))
        await self.recorder.posted()
        return len(self.posted) > before


@pytest.fixture
def posts() -> Posts:
    return Posts()


async def test_an_event_says_about_what_and_by_whom(posts: Posts) -> None:
    assert await posts.record("why")
    (event,) = posts.posted
    assert event["regarding"] == {
        "apiVersion": "kubediffusion.io/v1alpha1",
        "kind": "DiffusionWorkflow",
        "name": "sd3",
        "namespace": "ns",
        "uid": "u-1",
    }
    assert event["metadata"]["namespace"] == "ns"
    assert event["metadata"]["name"].startswith("sd3.")
    assert (event["type"], event["reason"], event["note"]) == ("Warning", "R", "why")
    assert event["eventTime"] == "2026-01-31T12:00:00.000005Z"
    assert event["reportingInstance"] == "pod-1"


async def test_the_same_words_are_told_once_in_a_while(posts: Posts) -> None:
    assert await posts.record()
    posts.now += REPEAT_SECONDS - 1
    assert not await posts.record()
    assert await posts.record("other words")
    posts.now += 2
    assert await posts.record()


async def test_an_object_that_talks_too_much_is_cut_short_and_others_are_not(posts: Posts) -> None:
    told = [await posts.record(f"{n}") for n in range(BURST + 10)]
    assert sum(told) == BURST
    assert await posts.record(about=Ref("v1", "Pod", "other", "u-2"))
    posts.now += REFILL_SECONDS
    assert await posts.record("later")
    assert not await posts.record("at once")


async def test_an_event_that_cannot_be_posted_is_dropped(posts: Posts) -> None:
    posts.fail = True
    assert not await posts.record()


async def test_a_server_that_does_not_answer_holds_nobody_up_and_what_waits_is_bounded(
    posts: Posts,
) -> None:
    posts.gate = asyncio.Event()
    for number in range(WAITING + 50):
        about = Ref("v1", "Pod", f"p{number}", f"u{number}")
        posts.recorder.record("ns", EventRecord(about, "Normal", "R", "m"))
        await asyncio.sleep(0)
    assert posts.tried == POSTS_AT_ONCE
    posts.gate.set()
    await posts.recorder.posted()
    assert len(posts.posted) == WAITING + POSTS_AT_ONCE
    names = {event["regarding"]["name"] for event in posts.posted}
    assert f"p{WAITING + 49}" in names  # the oldest were dropped


async def test_at_the_end_nothing_is_waited_for(posts: Posts) -> None:
    posts.gate = asyncio.Event()
    posts.recorder.record("ns", EventRecord(ABOUT, "Normal", "R", "m"))
    await posts.recorder.stop()
    assert posts.posted == []


async def test_long_words_are_cut_to_what_the_api_takes(posts: Posts) -> None:
    await posts.record("x" * 5000, about=Ref("v1", "Pod", "n" * 250, "u"), reason="R" * 200)
    (event,) = posts.posted
    assert len(event["note"]) == 1024
    assert len(event["reason"]) == 128
    assert len(event["metadata"]["name"]) <= 253
