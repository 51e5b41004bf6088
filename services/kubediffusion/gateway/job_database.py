# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The job store from an event loop: one thread, and a database that is away for a moment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
)

from kubediffusion.errors import Unavailable
from kubediffusion.gateway.config import JobLimits
from kubediffusion.gateway.job_store import JobStore

T = TypeVar("T")
log = logging.getLogger(__name__)
GOING = "the gateway is shutting down; ask another one"
# A restart, a failover or another's lock pass; each wait is twice the one before.
ATTEMPTS = 6
FIRST_WAIT = 0.05


class JobDatabase:
    """Every error of the database leaves as Unavailable, reason JobDatabase."""

    def __init__(
        self,
        url: str,
        limits: JobLimits,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._url = url
        self._limits = limits
        self._sleep = sleep
        # SQLite wants one thread; other databases do not mind.
        self._thread = ThreadPoolExecutor(1, "gateway-jobs")
        self._store: JobStore | None = None

    async def open(self) -> None:
        try:
            self._store = await self._in_thread(lambda: JobStore(self._url, self._limits))
        except (SQLAlchemyError, ImportError) as error:
            raise Unavailable(
                f"the job database {_shown(self._url)} cannot be opened: {_words(error)}"
                + (_DRIVER if isinstance(error, ImportError) else ""),
                field="job_database",
                reason="JobDatabase",
            ) from error

    @property
    def is_open(self) -> bool:
        return self._store is not None

    async def close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            await self._in_thread(store.close)
        self._thread.shutdown()

    async def do(self, work: Callable[[JobStore], T]) -> T:
        """`work` in the thread, again where the database was away: it must bear being repeated."""
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            if (store := self._store) is None:
                raise Unavailable(GOING)
            try:
                return await self._in_thread(lambda store=store: work(store))
            except SQLAlchemyError as error:
                if attempt == ATTEMPTS or not _passes(error):
                    log.warning("the job database does not answer: %s", _words(error))
                    raise Unavailable(
                        f"the job database {_shown(self._url)} does not answer: {_words(error)}; "
                        "ask again later",
                        reason="JobDatabase",
                    ) from error
            await self._sleep(wait)
            wait *= 2
        raise AssertionError("the last attempt returns or raises")

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


_DRIVER = (
    "; its driver is not installed (for PostgreSQL: pip install 'kubediffusion[postgres]', and a "
    "URL that begins with postgresql+psycopg://)"
)


def _passes(error: SQLAlchemyError) -> bool:
    """Whether the same may well succeed a moment later."""
    return isinstance(error, OperationalError | InterfaceError) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )


def _words(error: Exception) -> str:
    """Without the statement, whose values are a client's own, and the link to a manual."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return str(cause).partition("\n")[0] or type(cause).__name__


def _shown(url: str) -> str:
    """Without its password."""
    try:
        return repr(sa.make_url(url))
    except ArgumentError:
        return "of that URL"
