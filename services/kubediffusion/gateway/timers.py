# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Named timers of one owner, which end with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Timers:
    def __init__(self) -> None:
        self._handles: dict[object, asyncio.TimerHandle] = {}

    def after(self, name: object, delay: float, action: Callable[[], None]) -> None:
        """Once, in `delay` seconds; in place of an earlier one of that name."""

        def fire() -> None:
            self._handles.pop(name, None)
            action()

        self.cancel(name)
        self._handles[name] = asyncio.get_running_loop().call_later(delay, fire)

    def every(self, name: object, period: float, action: Callable[[], None]) -> None:
        """Again and again, the first time in `period` seconds, until it is cancelled."""

        def tick() -> None:
            self.after(name, period, tick)
            action()

        self.after(name, period, tick)

    def cancel(self, name: object) -> None:
        if (handle := self._handles.pop(name, None)) is not None:
            handle.cancel()

    def cancel_all(self) -> None:
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()
