# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Programs that end with the tests, however the tests end."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

# Waits for its standard input to close, which the kernel does when the tests' process is gone.
_GUARD = "cat >/dev/null; kill -KILL 0"


class Processes:
    """A process group that is killed by `stop`, or when this process dies, even by kill -9.

    (PR_SET_PDEATHSIG would follow the thread that started a program, not the process.)
    """

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._guard = subprocess.Popen(["sh", "-c", _GUARD], stdin=subprocess.PIPE, process_group=0)

    @property
    def group(self) -> int:
        """The process group; what joins it ends with it."""
        return self._guard.pid

    def start(
        self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run `command`; its words are added to ``NAME.log``."""
        with (self._logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                process_group=self.group,
            )
        self._running[name] = process
        return process

    def kill(self, name: str) -> None:
        """Kill -9 one of them, and wait until it is gone. Nothing where it is not there."""
        process = self._running.pop(name, None)
        if process is not None:
            process.kill()
            process.wait()

    def check(self) -> None:
        """Raises RuntimeError with the last words of a program that has ended by itself."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}:\n{self.tail(name)}")

    def pid(self, name: str) -> int:
        return self._running[name].pid

    def tail(self, name: str, lines: int = 15) -> str:
        text = (self._logs / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """Kill all of them. A second call does nothing."""
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.close()
        self._guard.wait()
        for process in self._running.values():
            process.wait()
        self._running.clear()


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on; all different."""
    with contextlib.ExitStack() as open_sockets:
        ports = []
        for _ in range(count):
            listener = open_sockets.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            ports.append(listener.getsockname()[1])
        return ports
