# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The process around a node: threads, signals, the parent, and the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator

import torch

from kubediffusion import heap, tensors
from kubediffusion.errors import KubeDiffusionError
from kubediffusion.node.config import NodeConfig, thread_count
from kubediffusion.node.library import Library
from kubediffusion.node.server import NodeServer
from kubediffusion.telemetry.logging import configure

# A poisoned device: sysexits' EX_SOFTWARE, so that a supervisor can tell it from a bad flag.
EXIT_POISONED = 70
# Every planned model failed for good (`NodeConfig.exit_on_failure`).
EXIT_FAILED = 3
# What Kubernetes keeps of a termination log, in bytes.
LAST_WORDS = 4096

log = logging.getLogger(__name__)


def run_process(config: NodeConfig, library: Library | None = None) -> None:
    """See `kubediffusion.node.run`."""
    configure(config.log_level, json=config.log_json, node=config.node_id)
    tensors.tune_malloc()
    torch.set_num_threads(thread_count(config))
    with contextlib.suppress(RuntimeError):  # set already, by whoever forked us
        torch.set_num_interop_threads(1)
    try:
        code = asyncio.run(_serve(config, library or default_library()))
    except KubeDiffusionError as error:
        log.error("node %s cannot start: %s", config.node_id, error)
        last_words(config, f"{error.reason}: {error}")
        code = 1
    finally:
        # Loading froze what there is; bindings written in C++ would call that leaked, at length.
        heap.unsettle()
    if code:
        sys.exit(code)


def last_words(config: NodeConfig, text: str) -> None:
    """Into the termination log: cut where a character ends, and never a reason to fail."""
    path = config.termination_log
    if not (config.exit_on_failure or path.exists()):
        return
    try:
        path.write_bytes(text.encode()[:LAST_WORDS].decode(errors="ignore").encode())
    except OSError as error:
        log.warning("cannot write the termination log %s: %s", path, error.strerror)


def default_library() -> Library:
    from kubediffusion import models, sources

    return Library(models.family, sources.open)


async def _serve(config: NodeConfig, library: Library) -> int:
    server = NodeServer(config, library)
    with _stopping(server, config) as at_once:
        try:
            await server.start()
            await server.drain_asked.wait()
            drain = asyncio.ensure_future(server.drain())
            hurry = asyncio.ensure_future(at_once.wait())
            await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
            for task in (drain, hurry):
                task.cancel()
            await asyncio.gather(drain, hurry, return_exceptions=True)
        finally:
            await server.stop(0.0 if at_once.is_set() or server.broken.is_set() else 1.0)
    return _exit_code(server, config, hurried=at_once.is_set())


def _exit_code(server: NodeServer, config: NodeConfig, hurried: bool) -> int:
    if server.poisoned:
        last_words(config, f"DeviceFailed: {server.poisoned}")
        return EXIT_POISONED
    if server.failure:
        last_words(config, server.failure)
        return EXIT_FAILED
    return 1 if hurried else 0


@contextlib.contextmanager
def _stopping(server: NodeServer, config: NodeConfig) -> Iterator[asyncio.Event]:
    """The first SIGTERM or SIGINT drains; a second one, or the end of the parent, ends at once."""
    loop = asyncio.get_running_loop()
    at_once = asyncio.Event()

    def on_signal() -> None:
        if server.drain_asked.is_set():
            at_once.set()
        server.drain_asked.set()

    def on_orphaned() -> None:
        loop.remove_reader(sentinel)
        log.warning("the process that started this node is gone; so it goes too")
        at_once.set()
        server.drain_asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    sentinel = _parent_sentinel() if config.exit_with_parent else -1
    if sentinel >= 0:
        loop.add_reader(sentinel, on_orphaned)
    try:
        yield at_once
    finally:
        if sentinel >= 0:
            loop.remove_reader(sentinel)


def _parent_sentinel() -> int:
    """A descriptor that becomes readable when the process that started this one ends.

    With multiprocessing it is that process' own pipe, which is right under a fork server too,
    where the parent by number is the server.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        return parent.sentinel
    return os.pidfd_open(os.getppid())
