# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Node processes, forked from a server that has imported torch already.

Importing torch, diffusers and transformers takes seconds; a fork of a process that has done so
takes a tenth of one, and shares their memory. The fork server (multiprocessing's) has one thread
and no gRPC at work, so its forks are sound. It is one for the whole of this process, and is warm
for every later run in it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from kubediffusion.errors import Unavailable
from kubediffusion.local.folders import remove_if_stale
from kubediffusion.node import NodeConfig

_context = multiprocessing.get_context("forkserver")
_starting = threading.Lock()
# Servers (by pid) that have forked a node, and so have imported everything.
_warm: set[int | None] = set()


def warm_up(modules: Sequence[str]) -> None:
    """Starts the fork server, which imports `modules` while this returns at once.

    Only the first call in a process chooses them; what a node lacks it imports itself. Where the
    server cannot be started, `NodeProcess.start` says so.
    """
    # A server that still imports would see only after seconds that we are gone.
    atexit.unregister(_give_up_warming)
    atexit.register(_give_up_warming)
    with _starting, contextlib.suppress(OSError):
        _context.set_forkserver_preload(["kubediffusion.local.hush", *modules])
        forkserver.ensure_running()


def _give_up_warming() -> None:
    """Ends a server that nobody waits for any more, unless it is warm: then it ends with us."""
    pid = _server_pid()
    if pid is not None and pid not in _warm:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _server_pid() -> int | None:
    return forkserver._forkserver._forkserver_pid  # pyright: ignore[reportAttributeAccessIssue]


class NodeProcess:
    """One node process, in a process group of its own, so that Ctrl-C is ours alone to handle."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(process.sentinel, self._end)

    @classmethod
    async def start(
        cls, config: NodeConfig, log: Path, run: Path, serve: Callable[[NodeConfig], None]
    ) -> NodeProcess:
        """It calls `serve`; its output goes to `log`. If this process here just dies, it removes
        the folder `run`."""
        process = _context.Process(target=_node, args=(config, log, run, serve), daemon=True)
        unwanted = threading.Event()
        # Waits for the server's imports, the first time.
        starting = asyncio.ensure_future(asyncio.to_thread(_start, process, unwanted))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # A thread cannot be cancelled, but what it waits for can be ended.
            unwanted.set()
            _give_up_warming()
            with contextlib.suppress(EOFError, OSError):
                await starting
                await cls(process).kill()
            raise
        except (EOFError, OSError) as error:
            raise Unavailable(
                f"cannot start a node process: {error or 'the fork server ended'}; to see why, run "
                f"{sys.executable} -c 'import kubediffusion.node.process'",
                reason="NodeStart",
            ) from error
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        return await asyncio.shield(self._ended)

    async def kill(self) -> None:
        """No process stays behind, nor a zombie of it."""
        self.signal(signal.SIGKILL)
        await self.wait()

    def _end(self) -> None:
        self._loop.remove_reader(self._process.sentinel)
        self._process.join()
        self._ended.set_result(self._process.exitcode)

    def signal(self, number: signal.Signals) -> None:
        if not self._ended.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _start(process: Any, unwanted: threading.Event) -> None:
    with _starting:
        if unwanted.is_set():
            raise EOFError
        process.start()
        _warm.add(_server_pid())


# ---------------------------------------------------------------- inside the node's process


def _node(config: NodeConfig, log: Path, run: Path, serve: Callable[[NodeConfig], None]) -> None:
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGHUP):  # which the server ignores
        signal.signal(number, signal.SIG_DFL)
    # What the server imported is garbage never: not looked at, so not copied either.
    gc.freeze()
    gc.enable()
    # Locks that libraries make (tqdm's) would be named ones, left over when this process is killed.
    multiprocessing.set_start_method("fork", force=True)
    _log_to(log)
    threading.Thread(target=_leave_with_parents, args=(run,), daemon=True).start()
    serve(config)


def _log_to(path: Path) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


def _leave_with_parents(run: Path) -> None:
    """Ends this process when the supervisor or the fork server does, kill -9 included."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinels: list[int] = [parent.sentinel]
    if hasattr(os, "pidfd_open"):
        sentinels.append(os.pidfd_open(os.getppid()))
    multiprocessing.connection.wait(sentinels)
    # If it was the supervisor, nobody else will clean up after it.
    remove_if_stale(run)
    os.kill(os.getpid(), signal.SIGKILL)
