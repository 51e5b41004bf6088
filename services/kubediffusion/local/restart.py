# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""When a node process that died is started again. Pure."""

from __future__ import annotations

import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class RestartPolicy:
    """At once, unless it keeps dying young; all in seconds.

    A node that was ready for `healthy` seconds starts with a clean record.
    """

    healthy: float = 10.0
    first: float = 0.2
    most: float = 30.0
    # So many young deaths in a row, and whoever waits for the node is told.
    crash_loop: int = 4

    def delay(self, young_deaths: int) -> float:
        """Before the next start, after so many young deaths in a row: 0, 0, 0.2, 0.4, 0.8, …"""
        if young_deaths <= 1:
            return 0.0
        return min(self.most, self.first * 2.0 ** min(young_deaths - 2, 32))


def how_it_ended(exit_code: int) -> str:
    """``ended with code 3`` or ``was killed by SIGKILL``, with what that often means."""
    if exit_code >= 0:
        return f"ended with code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = " (often: out of memory)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def restart_reason(exit_code: int) -> str:
    """The metric's label: few values."""
    if exit_code == 0:
        return "exited"
    return "killed" if exit_code < 0 else "crashed"
