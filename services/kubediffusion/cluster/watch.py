# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A mirror of some of the cluster's objects that is kept up for ever: list, then watch.

The mirror only ever changes by what the API server says. While the server cannot be reached, or
refuses us, it stays as it is: nothing is forgotten because nobody answered.

    list ──► watch from the list's version ──► events and bookmarks move the version on
     ▲              │ ended, broken, silent: watch again from the last version
     └──────────────┘ 410 Gone: that version is forgotten over there; list, and tell the differences
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from kubediffusion.cluster.api import ApiError, Kind, Object, error_of
from kubediffusion.errors import KubeDiffusionError

Key: TypeAlias = "tuple[str, str]"

PAGE = 500
GONE = 410

log = logging.getLogger(__name__)


class Server(Protocol):
    """What a watch needs of `cluster.api.Api`."""

    async def request(self, method: str, path: str, *, params: Any = None) -> Object: ...

    def stream(
        self, path: str, params: Any, *, silence: float
    ) -> AbstractAsyncContextManager[AsyncIterator[Object]]: ...


@dataclass(frozen=True, slots=True)
class Change:
    """`old` is None for an object that is new, `new` for one that is gone."""

    old: Object | None
    new: Object | None

    @property
    def object(self) -> Object:
        """The newest that is known of it."""
        found = self.new if self.new is not None else self.old
        assert found is not None, "a change is of something"
        return found


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds. A watch is ended by the server after `watch`, and taken for dead when nothing, not
    even a bookmark, has come for `silence`: which has to be longer."""

    watch: float = 50.0
    silence: float = 70.0
    backoff_first: float = 0.2
    backoff_most: float = 10.0
    # A watch that ends sooner, and without a word, is counted as a failure.
    least: float = 1.0


class Watch:
    """The objects of one kind: `objects`, by (namespace, name), without managedFields.

    `on_change` is told of each change once it is in `objects`; of an object that was deleted and
    made again unseen, as one change between different uids. Use `start` and `stop`, or `run` in a
    task of your own. `synced` is set after the first full list.
    """

    def __init__(
        self,
        api: Server,
        kind: Kind,
        *,
        namespace: str = "",
        label_selector: str = "",
        field_selector: str = "",
        on_change: Callable[[Change], None] = lambda change: None,
        pace: Pace | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.kind = kind
        self.objects: dict[Key, Object] = {}
        self.synced = asyncio.Event()
        # Why the mirror is not kept up just now; empty while it is.
        self.trouble = ""
        self._api = api
        self._path = kind.path(namespace)
        self._selectors = {
            name: value
            for name, value in (
                ("labelSelector", label_selector),
                ("fieldSelector", field_selector),
            )
            if value
        }
        self._on_change = on_change
        self._pace = pace or Pace()
        self._jitter = jitter
        self._version = ""
        self._failures = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self.run(), name=f"watch {self.kind.plural}")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def run(self) -> None:
        """For ever, whatever the API server does."""
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except KubeDiffusionError as error:
                if isinstance(error, ApiError) and error.status == GONE:
                    self._version = ""
                self._failed(error)
            if self._failures:
                await asyncio.sleep(self._pause())

    # ------------------------------------------------------------ list

    async def _list(self) -> None:
        """Takes over what is there now, and tells what is new, different or gone."""
        found: dict[Key, Object] = {}
        params = {**self._selectors, "limit": str(PAGE)}
        while True:
            page = await self._api.request("GET", self._path, params=params)
            kind = str(page.get("kind", "")).removesuffix("List")
            for each in page.get("items") or ():
                # The items of a list do not say what they are.
                each.setdefault("kind", kind)
                each.setdefault("apiVersion", page.get("apiVersion", ""))
                found[_key(each)] = each
            meta = page.get("metadata") or {}
            if not meta.get("continue"):
                break
            params["continue"] = meta["continue"]
        for key in [key for key in self.objects if key not in found]:
            self._take(key, None)
        for key, each in found.items():
            self._take(key, each)
        self._version = str(meta.get("resourceVersion") or "0")
        self.synced.set()

    # ------------------------------------------------------------ watch

    async def _watch(self) -> None:
        """From the last version on, until the server ends it. Raises KubeDiffusionError."""
        pace = self._pace
        params = {
            **self._selectors,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(max(1, round(pace.watch))),
        }
        now = asyncio.get_running_loop().time
        begin = now()
        async with self._api.stream(self._path, params, silence=pace.silence) as events:
            async for event in events:
                self._receive(event)
                self._recovered()
        if now() - begin >= pace.least:
            self._recovered()
        elif not self._failures:
            self._failures = 1  # no reason to complain yet, but none to ask without a pause

    def _receive(self, event: Object) -> None:
        kind, found = event.get("type"), event.get("object")
        if kind == "ERROR":
            raise error_of(event)
        if not isinstance(found, dict) or "metadata" not in found:
            raise KubeDiffusionError(f"no event of a watch: {json.dumps(event)[:200]}")
        version = found["metadata"].get("resourceVersion")
        if kind != "BOOKMARK":
            self._take(_key(found), None if kind == "DELETED" else found)
        if version:
            self._version = version

    def _take(self, key: Key, new: Object | None) -> None:
        old = self.objects.get(key)
        if new is None:
            self.objects.pop(key, None)
        else:
            new["metadata"].pop("managedFields", None)
            self.objects[key] = new
        if old is None and new is None:
            return
        if old is not None and new is not None and _same(old, new):
            return
        try:
            self._on_change(Change(old, new))
        except Exception:
            # A bug of a listener's must not end the mirror that others look at.
            log.exception("a listener failed at a change of %s %s", self.kind.plural, "/".join(key))

    # ------------------------------------------------------------ trouble

    def _failed(self, error: KubeDiffusionError) -> None:
        self._failures += 1
        gone = isinstance(error, ApiError) and error.status == GONE
        if not gone or self._failures > 1:
            first = not self.trouble
            self.trouble = str(error)
            # Once: it is tried again for as long as it takes.
            log.log(
                logging.WARNING if first else logging.DEBUG,
                "watching %s: %s; trying again, and keeping what is known",
                self.kind.plural,
                error,
            )

    def _recovered(self) -> None:
        self._failures = 0
        if self.trouble:
            self.trouble = ""
            log.info("watching %s again", self.kind.plural)

    def _pause(self) -> float:
        pace = self._pace
        longest = min(pace.backoff_first * 2 ** min(self._failures - 1, 16), pace.backoff_most)
        return longest * (0.5 + 0.5 * self._jitter())


def _key(found: Object) -> Key:
    meta = found["metadata"]
    return (str(meta.get("namespace") or ""), str(meta["name"]))


def _same(old: Object, new: Object) -> bool:
    """By version and uid: an object that was deleted and made again has both new."""
    ours, theirs = old["metadata"], new["metadata"]
    return (ours.get("uid"), ours.get("resourceVersion")) == (
        theirs.get("uid"),
        theirs.get("resourceVersion"),
    )
