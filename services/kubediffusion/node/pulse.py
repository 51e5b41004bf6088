# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Whether the device still gets on with its work.

A node is judged by what it does, not by a clock. Loading weights, compiling, a first step or a
one-shot task take as long as they take: nobody can tell a slow one from one that hangs, so none of
them is ever called dead. Denoising steps are told apart by those before them: of a lease that has
done some, the next one is as long, and a device that is still at it after a hundred times that
(ten minutes at the least) will not end it. Beyond that a device is dead when its thread is, or when
an error has poisoned it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from kubediffusion.node.tasks import Task

STALL_SECONDS = 600.0
STALL_STEPS = 100.0

Beat: TypeAlias = "tuple[tuple[object, ...], ...]"


class Pulse:
    """Looked at once a second or so, from the event loop."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._beat: Beat = ()
        self._since = now()

    def trouble(self, running: Sequence[Task], *, alive: bool, poisoned: str, busy: bool) -> str:
        """Why the node cannot go on; empty while it can.

        `busy`: the device loads or unloads a model, between two steps of what is running.
        """
        if poisoned:
            return f"the device failed: {poisoned}"
        if not alive:
            return "the device's thread has ended"
        now, beat = (
            self._now(),
            tuple((task.name, task.key.epoch, task.steps_run) for task in running),
        )
        if beat != self._beat or busy or not beat:
            self._beat, self._since = beat, now
            return ""
        stepped = [task for task in running if task.is_lease and task.steps_run]
        if len(stepped) < len(running):
            return ""
        step = max(task.run_seconds / task.steps_run for task in stepped)
        stalled = now - self._since
        if stalled < max(STALL_SECONDS, STALL_STEPS * step):
            return ""
        names = ", ".join("/".join(task.name) for task in running)
        return f"no step of {names} for {stalled:.0f} s, where one took {step:.2f} s"
