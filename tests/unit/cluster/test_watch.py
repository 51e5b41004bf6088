# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A mirror of objects: what it makes of each thing that an API server can answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kubediffusion.cluster.api import ApiError, ApiUnreachable, Kind
from kubediffusion.cluster.watch import Change, Pace, Watch

THINGS = Kind("example.io/v1", "things")
FAST = Pace(backoff_first=0.001, backoff_most=0.002, least=0.0)


def thing(name: str, version: int, uid: str = "") -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": "here",
            "uid": uid or f"uid-{name}",
            "resourceVersion": str(version),
            "managedFields": [{"manager": "somebody"}],
        }
    }


def event(kind: str, name: str, version: int, uid: str = "") -> dict[str, Any]:
    return {"type": kind, "object": thing(name, version, uid)}


def page(*items: dict[str, Any], version: int, more: str = "") -> dict[str, Any]:
    metadata = {"resourceVersion": str(version), "continue": more}
    return {
        "kind": "ThingList",
        "apiVersion": "example.io/v1",
        "metadata": metadata,
        "items": [*items],
    }


class Script:
    """An API server that answers by a list of answers; at its end it says nothing more.

    A page or an error answers a list, a list of events (or an error in it) a watch.
    """

    def __init__(self, *answers: Any) -> None:
        self.answers = [*answers]
        self.asked: list[dict[str, str]] = []
        self.over = asyncio.Event()

    async def _next(self, params: dict[str, str]) -> Any:
        self.asked.append(dict(params))
        if not self.answers:
            self.over.set()
            await asyncio.Event().wait()
        return self.answers.pop(0)

    async def request(self, method: str, path: str, *, params: Any = None) -> dict[str, Any]:
        assert (method, path) == ("GET", "/apis/example.io/v1/namespaces/here/things")
        answer = await self._next(params)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, dict), "the watch lists where the test expects it to watch"
        return answer

    @asynccontextmanager
    async def stream(
        self, path: str, params: Any, *, silence: float
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        answer = await self._next(params)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, list), "the watch watches where the test expects it to list"

        async def events() -> AsyncIterator[dict[str, Any]]:
            for each in answer:
                if isinstance(each, Exception):
                    raise each
                yield each

        yield events()


Follow = Callable[..., Awaitable[tuple[Watch, list[str], Script]]]


@pytest.fixture
async def follow() -> AsyncIterator[Follow]:
    """Follows a script to its end; gives the watch, what it told and what it asked."""
    watches: list[Watch] = []

    async def _follow(*answers: Any, pace: Pace = FAST) -> tuple[Watch, list[str], Script]:
        script, told = Script(*answers), []

        def tell(change: Change) -> None:
            word = "added" if change.old is None else "gone" if change.new is None else "changed"
            told.append(f"{word} {change.object['metadata']['name']}")

        watch = Watch(script, THINGS, namespace="here", on_change=tell, pace=pace)
        watches.append(watch)
        watch.start()
        async with asyncio.timeout(10):
            await script.over.wait()
        return watch, told, script

    yield _follow
    for watch in watches:
        await watch.stop()


def names(watch: Watch) -> set[str]:
    return {name for _, name in watch.objects}


async def test_lists_and_then_follows_from_the_lists_version(follow: Follow) -> None:
    watch, told, script = await follow(
        page(thing("a", 1), thing("b", 2), version=7),
        [event("ADDED", "c", 8), event("MODIFIED", "a", 9), event("DELETED", "b", 10)],
    )
    assert names(watch) == {"a", "c"}
    assert told == ["added a", "added b", "added c", "changed a", "gone b"]
    assert script.asked[1]["resourceVersion"] == "7"
    assert script.asked[1]["allowWatchBookmarks"] == "true"
    assert script.asked[2]["resourceVersion"] == "10"
    assert watch.synced.is_set()


async def test_objects_say_what_they_are_and_nothing_of_their_managers(follow: Follow) -> None:
    watch, _, _ = await follow(page(thing("a", 1), version=1))
    found = watch.objects["here", "a"]
    assert (found["apiVersion"], found["kind"]) == ("example.io/v1", "Thing")
    assert "managedFields" not in found["metadata"]


async def test_reads_every_page(follow: Follow) -> None:
    watch, _, script = await follow(
        page(thing("a", 1), version=5, more="next"), page(thing("b", 2), version=5)
    )
    assert names(watch) == {"a", "b"}
    assert script.asked[1]["continue"] == "next"


async def test_half_a_list_changes_nothing(follow: Follow) -> None:
    expired = ApiError("the continue token is too old", status=410)
    watch, told, _ = await follow(
        page(thing("a", 1), version=5),
        [{"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old"}}],
        page(thing("z", 6), version=9, more="next"),
        expired,
        page(thing("a", 1), version=9),
    )
    assert names(watch) == {"a"}
    assert told == ["added a"]


async def test_a_bookmark_moves_the_version_on(follow: Follow) -> None:
    bookmark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "500"}}}
    watch, told, script = await follow(page(thing("a", 1), version=5), [bookmark])
    assert script.asked[2]["resourceVersion"] == "500"
    assert (names(watch), told) == ({"a"}, ["added a"])


@pytest.mark.parametrize(
    "gone",
    [
        [{"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old"}}],
        ApiError("too old resource version", status=410, reason="Expired"),
    ],
    ids=["as an event", "as an answer"],
)
async def test_after_a_version_that_is_gone_the_differences_are_told(
    follow: Follow, gone: Any
) -> None:
    watch, told, script = await follow(
        page(thing("kept", 1), thing("changed", 2), thing("deleted", 3), version=5),
        gone,
        page(thing("kept", 1), thing("changed", 8), thing("new", 9), version=10),
    )
    assert names(watch) == {"kept", "changed", "new"}
    assert told[3:] == ["gone deleted", "changed changed", "added new"]
    assert script.asked[-1]["resourceVersion"] == "10"


async def test_one_that_was_made_again_unseen_is_a_change(follow: Follow) -> None:
    _, told, _ = await follow(
        page(thing("a", 1, uid="first"), version=5),
        ApiError("too old", status=410),
        page(thing("a", 9, uid="second"), version=10),
    )
    assert told == ["added a", "changed a"]


async def test_goes_on_from_the_last_version_after_a_break(follow: Follow) -> None:
    watch, told, script = await follow(
        page(thing("a", 1), version=5),
        [event("ADDED", "b", 6), ApiUnreachable("torn off")],
        ApiUnreachable("connection refused"),
        [event("DELETED", "a", 8)],
    )
    assert names(watch) == {"b"}
    assert told == ["added a", "added b", "gone a"]
    assert [asked["resourceVersion"] for asked in script.asked[1:]] == ["5", "6", "6", "8"]
    assert not watch.trouble


async def test_forgets_nothing_while_the_server_is_away_and_says_why(follow: Follow) -> None:
    away = [ApiUnreachable(f"attempt {n}: connection refused") for n in range(5)]
    watch, told, _ = await follow(page(thing("a", 1), version=5), *away)
    assert (names(watch), told) == ({"a"}, ["added a"])
    assert "connection refused" in watch.trouble


async def test_waits_for_a_server_that_refuses_it_at_first(follow: Follow) -> None:
    watch, _, _ = await follow(
        ApiError("things is forbidden", status=403, reason="Forbidden"),
        ApiError("the server could not find the requested resource", status=404),
        page(thing("a", 1), version=5),
    )
    assert watch.synced.is_set()
    assert names(watch) == {"a"}


async def test_an_event_twice_is_told_once(follow: Follow) -> None:
    _, told, _ = await follow(
        page(version=5),
        [event("ADDED", "a", 6), event("ADDED", "a", 6), event("DELETED", "b", 7)],
    )
    assert told == ["added a"]


async def test_an_error_of_the_stream_is_tried_again_from_the_same_version(follow: Follow) -> None:
    overloaded = {"type": "ERROR", "object": {"code": 429, "message": "too many requests"}}
    _, _, script = await follow(page(version=5), [overloaded], [event("ADDED", "a", 6)])
    assert script.asked[2]["resourceVersion"] == "5"


async def test_watches_that_end_at_once_are_not_asked_for_without_a_pause() -> None:
    pauses: list[float] = []

    def jitter() -> float:
        pauses.append(1.0)
        return 1.0

    script = Script(page(version=5), [], [], [])
    pace = Pace(backoff_first=0.001, backoff_most=0.002, least=60.0)
    watch = Watch(script, THINGS, namespace="here", pace=pace, jitter=jitter)
    watch.start()
    async with asyncio.timeout(10):
        await script.over.wait()
    await watch.stop()
    assert len(pauses) == 3


async def test_a_listener_that_fails_does_not_end_the_mirror() -> None:
    script = Script(page(thing("a", 1), version=5), [event("ADDED", "b", 6)])

    def fail(change: Change) -> None:
        raise RuntimeError("a bug")

    watch = Watch(script, THINGS, namespace="here", on_change=fail, pace=FAST)
    watch.start()
    async with asyncio.timeout(10):
        await script.over.wait()
    await watch.stop()
    assert names(watch) == {"a", "b"}
