# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How a node that refused a task for its full queue is asked again."""

from __future__ import annotations

import math

# So long it is left alone, in seconds, unless it reports that it has less to do.
PAUSE = 0.1
# From so many unanswered tasks on it is not full any more.
_ENOUGH = 32


class Fullness:
    """One task is sent to see whether it is taken, and with each that is, one more at a time.

    Whoever waits for the node is many, and all of them would be refused by a node that has room
    for one.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing is known of a new stream's node."""
        # How many may be unanswered at once; 0: as many as there are.
        self._window = 0
        self._until = 0.0
        self._busy = 0
        self._asked: set[tuple[str, str]] = set()

    @property
    def known(self) -> bool:
        return self._window > 0

    @property
    def until(self) -> float:
        """When it may be sent another task, on the clock of `refused`."""
        if self._window and len(self._asked) >= self._window:
            return math.inf
        return self._until

    def refused(self, now: float, busy: int) -> None:
        """It has so many tasks, by its own last word."""
        self._window, self._busy, self._until = 1, busy, now + PAUSE
        self._asked.clear()

    def rested(self) -> None:
        self._until = 0.0

    def reported(self, busy: int) -> bool:
        """Whether there is room now that it has so many tasks."""
        if not self._window or busy >= self._busy:
            return False
        self._busy, self._until = busy, 0.0
        return True

    def sent(self, task: tuple[str, str]) -> None:
        if self._window:
            self._asked.add(task)

    def taken(self, task: tuple[str, str]) -> bool:
        """Whether that is news."""
        if task not in self._asked:
            return False
        self._asked.remove(task)
        self._window += 1
        if self._window > _ENOUGH:
            self.clear()
        return True

    def withdrawn(self, task: tuple[str, str]) -> bool:
        """It was given up before it was answered; whether another may take its place."""
        if task not in self._asked:
            return False
        self._asked.remove(task)
        return True
