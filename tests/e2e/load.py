# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Clients that ask at a rate of their own, whatever becomes of what they asked for before."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
import time
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import openai

from tests.e2e.release import PROMPT

# Enough different pictures that a mixed-up one is noticed, few enough to know each.
SEEDS = 4


@dataclass(frozen=True)
class Shot:
    """A request that ended; `digest` is of its picture, `error` is empty where it has one."""

    seed: int
    seconds: float
    digest: str = ""
    error: str = ""


class Load:
    """Load by the official client, in a thread: `rate` requests a second, an open loop.

    With `most` that many wait at most, so that a slow machine gets no backlog. Leaving the block
    stops asking, and waits for all answers. `retries`: the client's own, with all of a request
    under one idempotency key.
    """

    def __init__(
        self,
        url: str,
        workflow: str,
        rate: float,
        *,
        most: int = 1_000,
        retries: int = 0,
        patience: float = 300.0,
        **fields: Any,
    ) -> None:
        self.rate = rate
        self.shots: list[Shot] = []
        self.sent = 0
        self._url, self._workflow, self._fields = url, workflow, fields
        self._most, self._retries, self._patience = most, retries, patience
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping = True
        # After a failure nobody waits for the rest.
        self._thread.join(timeout=self._patience if error is None else 1.0)
        if error is None:
            assert not self._thread.is_alive(), f"{self.waiting} requests have no answer"

    @property
    def failures(self) -> list[str]:
        return [shot.error for shot in self.shots if shot.error]

    @property
    def waiting(self) -> int:
        """Asked for, not answered yet."""
        return self.sent - len(self.shots)

    def pictures(self) -> dict[int, set[str]]:
        """By seed, the digests of all pictures."""
        found: dict[int, set[str]] = {}
        for shot in self.shots:
            if not shot.error:
                found.setdefault(shot.seed, set()).add(shot.digest)
        return found

    def wait_done(self, count: int, timeout: float = 120.0) -> None:
        """Until so many more have ended. Raises TimeoutError, AssertionError where one failed."""
        with self._changed:
            wanted = len(self.shots) + count
            done = self._changed.wait_for(
                lambda: len(self.shots) >= wanted or bool(self.failures), timeout
            )
        assert not self.failures, self.failures
        if not done:
            raise TimeoutError(f"{wanted - len(self.shots)} of {count} have not ended")

    async def _run(self) -> None:
        shooting: set[asyncio.Task[None]] = set()
        async with openai.AsyncOpenAI(
            base_url=self._url,
            api_key="none",
            timeout=self._patience,
            max_retries=self._retries,
        ) as client:
            while not self._stopping:
                if len(shooting) < self._most:
                    shot = asyncio.create_task(self._shoot(client, self.sent % SEEDS))
                    shooting.add(shot)
                    shot.add_done_callback(shooting.discard)
                    self.sent += 1
                await asyncio.sleep(1 / self.rate)
            await asyncio.gather(*shooting)

    async def _shoot(self, client: openai.AsyncOpenAI, seed: int) -> None:
        begin = time.monotonic()
        digest = error = ""
        try:
            answer = await client.images.generate(
                model=self._workflow,
                prompt=PROMPT,
                extra_headers={"Idempotency-Key": uuid.uuid4().hex},
                extra_body={"seed": seed, **self._fields},
            )
            assert answer.data
            digest = digest_of(base64.b64decode(answer.data[0].b64_json or ""))
        except Exception as problem:
            cause = f" ({problem.__cause__!r})" if problem.__cause__ else ""
            error = f"{problem!r}{cause} after {time.monotonic() - begin:.1f} s"
        with self._changed:
            self.shots.append(Shot(seed, time.monotonic() - begin, digest, error))
            self._changed.notify_all()


def digest_of(picture: bytes) -> str:
    return hashlib.sha256(picture).hexdigest()
