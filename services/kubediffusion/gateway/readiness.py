# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Whether requests should be sent to this gateway."""

from __future__ import annotations

from collections.abc import Callable


class Readiness:
    """`why` says why not, and is empty where they should. Told to probes, never to requests: one
    that comes all the same is served as well as it can be."""

    def __init__(self, why: str = "") -> None:
        self.why = why
        # Called after every change.
        self.on_change: Callable[[], None] = lambda: None
        self._closed = False

    def close(self, why: str) -> None:
        """Not ready, whatever comes."""
        self.set(why)
        self._closed = True

    def set(self, why: str) -> None:
        if why != self.why and not self._closed:
            self.why = why
            self.on_change()
