# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which writes rest for a while. No clock: times come in as seconds.

A plan asks for a write as long as it is needed. Three writes must not be repeated at once: one that
the API server refuses for good, one that it accepts without keeping what was written, and one whose
object somebody else writes back every time. None of them may stop the rest of the namespace.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

REST_FIRST = 5.0
REST_MOST = 300.0
# Of one object's writes: so many at once, then so many a second.
BURST = 20.0
REFILL = 1.0

Key = tuple[str, str, str]  # namespace, kind, name; of a status the kind ends with "/status"


@dataclass
class _Record:
    tokens: float
    since: float
    digest: str = ""
    # The resourceVersion after the last write that changed nothing.
    unchanged: str = ""
    strikes: int = 0
    until: float = 0.0


class Holds:
    """One for the whole operator."""

    def __init__(self) -> None:
        self._records: dict[Key, _Record] = {}

    def wait(self, key: Key, digest: str, version: str, now: float) -> float:
        """Seconds that a write of `digest` over `version` has to wait; 0 where it may go."""
        record = self._records.get(key)
        if record is None:
            return 0.0
        # Another content, or an object that changed since, is another matter.
        repeated = record.digest == digest and record.unchanged in ("", version)
        if record.strikes and repeated and now < record.until:
            return record.until - now
        tokens = min(BURST, record.tokens + (now - record.since) * REFILL)
        return 0.0 if tokens >= 1 else (1 - tokens) / REFILL

    def wrote(self, key: Key, digest: str, before: str, after: str, now: float) -> bool:
        """`before` and `after` are the object's versions; whether the write changed nothing."""
        record = self._spend(key, now)
        if before != after:
            record.digest, record.unchanged, record.strikes = digest, "", 0
            return False
        self._strike(record, digest, now)
        record.unchanged = after
        return True

    def refused(self, key: Key, digest: str, now: float) -> None:
        record = self._spend(key, now)
        self._strike(record, digest, now)
        record.unchanged = ""

    def forget(self, namespace: str) -> None:
        for key in [key for key in self._records if key[0] == namespace]:
            del self._records[key]

    def expire(self, now: float) -> None:
        """To be called now and then: forgets what would be allowed anyway."""
        for key, record in list(self._records.items()):
            if now - record.since > 2 * REST_MOST:
                del self._records[key]

    def _spend(self, key: Key, now: float) -> _Record:
        record = self._records.setdefault(key, _Record(BURST, now))
        tokens = min(BURST, record.tokens + (now - record.since) * REFILL)
        record.tokens, record.since = max(0.0, tokens - 1), now
        return record

    @staticmethod
    def _strike(record: _Record, digest: str, now: float) -> None:
        record.strikes = record.strikes + 1 if record.digest == digest else 1
        record.digest = digest
        record.until = now + min(REST_FIRST * 2 ** min(record.strikes - 1, 16), REST_MOST)


def digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha1(canonical.encode(), usedforsecurity=False).hexdigest()
