# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The files of a run: sockets, logs and its state in one private folder, tensors in another.

A run holds an flock on its folder's ``lock`` for as long as it lives, however it ends. Whoever
starts next removes the folders whose lock is free. (Process ids come back; locks do not.)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kubediffusion.errors import Unavailable

_PREFIX = "run-"
_LOCK = "lock"
_STATE = "state.json"
# sockaddr_un.sun_path has 108 bytes (104 on macOS) with the zero at its end.
_SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103
_LONGEST_NAME = 48


@dataclass(frozen=True)
class RunState:
    """What a running `up` tells other commands of the same user."""

    pid: int
    grpc: str = ""
    http: str = ""
    metrics: str = ""
    workflows: tuple[str, ...] = ()


class RunFolder:
    """One run's files. `path` holds sockets and logs, `shm` shared memory; close() removes both."""

    def __init__(self, base: Path | None = None) -> None:
        """Raises Unavailable where no private folder can be had."""
        self.base = base if base is not None else runtime_base()
        _make_private(self.base)
        self.path = self.base / f"{_PREFIX}{secrets.token_hex(4)}"
        self.shm = _shm_path(self.path)
        try:
            # One start at a time, or another's sweep could find our lock before we hold it.
            with _alone(self.base):
                sweep(self.base)
                self.path.mkdir(mode=0o700)
                self._lock = _take_lock(self.path / _LOCK)
            self.shm.mkdir(mode=0o700)
        except OSError as error:
            raise _no_folder(self.path, error) from error

    def socket(self, node: str) -> str:
        """Where the node listens, as gRPC writes it."""
        return f"unix:{self.path / f'{node}.sock'}"

    def log(self, node: str) -> Path:
        return self.path / f"{node}.log"

    def announcement(self, node: str) -> Path:
        return self.path / f"{node}.json"

    def write_json(self, name: str, content: object) -> Path:
        """Whole or not at all, because others read it at any time."""
        path = self.path / name
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(content, indent=2) + "\n")
        fresh.replace(path)
        return path

    def publish(self, state: RunState) -> None:
        self.write_json(_STATE, asdict(state))

    def close(self) -> None:
        remove_run(self.path)
        os.close(self._lock)


def runtime_base() -> Path:
    """A folder of this user's runs, short enough for the names of sockets."""
    candidates = [Path(tempfile.gettempdir()), Path("/tmp")]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        candidates.insert(0, Path(runtime))
    for folder in candidates:
        base = folder / f"kubediffusion-{os.getuid()}"
        fits = len(os.fsencode(base)) + _LONGEST_NAME <= _SOCKET_PATH_BYTES
        if fits and os.access(folder, os.W_OK | os.X_OK):
            return base
    return Path("/tmp") / f"kubediffusion-{os.getuid()}"


def running(base: Path | None = None) -> list[RunState]:
    """The runs of this user that serve others now, the newest first."""
    base = base if base is not None else runtime_base()
    found: list[tuple[float, RunState]] = []
    for run in _runs(base):
        with contextlib.suppress(OSError, ValueError, TypeError), _stale(run) as stale:
            if not stale:
                file = run / _STATE
                fields: Mapping[str, object] = json.loads(file.read_text())
                found.append((file.stat().st_mtime, _read_state(fields)))
    return [state for _, state in sorted(found, key=lambda pair: pair[0], reverse=True)]


def _read_state(fields: Mapping[str, object]) -> RunState:
    """Another version's state may lack fields, or have more."""
    known: dict[str, Any] = {k: v for k, v in fields.items() if k in RunState.__dataclass_fields__}
    return RunState(**{**known, "workflows": tuple(known.get("workflows", ()))})


def sweep(base: Path) -> None:
    """Removes what runs left that ended without a chance to clean up."""
    for run in _runs(base):
        remove_if_stale(run)


def remove_if_stale(run: Path) -> None:
    """Removes the files of a run that nobody holds any more."""
    with contextlib.suppress(OSError), _stale(run) as stale:
        if stale:
            remove_run(run)


def remove_run(path: Path) -> None:
    """Removes the files of a run; what is gone already is no error."""
    shutil.rmtree(_shm_path(path), ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)


def _runs(base: Path) -> list[Path]:
    try:
        return sorted(entry for entry in base.iterdir() if entry.name.startswith(_PREFIX))
    except OSError:
        return []


@contextlib.contextmanager
def _stale(run: Path) -> Iterator[bool]:
    """Whether nobody holds the run. Raises OSError where it has no lock (yet)."""
    lock = os.open(run / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)


@contextlib.contextmanager
def _alone(base: Path) -> Iterator[None]:
    folder = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _take_lock(path: Path) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # `running` may look at it for a moment
    return lock


def _shm_path(run: Path) -> Path:
    """In memory where the machine has a folder for it; beside the sockets otherwise."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK | os.X_OK):
        return memory / f"kubediffusion-{os.getuid()}-{run.name}"
    return run / "shm"


def _make_private(base: Path) -> None:
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = base.lstat()
    except OSError as error:
        raise _no_folder(base, error) from error
    private = stat.S_ISDIR(status.st_mode) and not stat.S_IMODE(status.st_mode) & 0o077
    if not private or status.st_uid != os.getuid():
        raise Unavailable(
            f"{base} must be a folder that only you can open; remove it, or set XDG_RUNTIME_DIR "
            "to a private folder",
            reason="RuntimeFolder",
        )


def _no_folder(path: Path, error: OSError) -> Unavailable:
    return Unavailable(
        f"cannot make the folder {path}: {error.strerror}; set XDG_RUNTIME_DIR to a folder that "
        "you can write to",
        reason="RuntimeFolder",
    )
