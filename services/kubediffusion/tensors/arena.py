# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Shared memory: one file for one tensor, mapped by its producer and by its consumers.

A producer owns a folder ``<root>/<incarnation>`` and holds an flock on the file beside it,
``<root>/<incarnation>.lock``, for as long as it lives. The kernel drops the lock however the
process ends, so a free lock means garbage, and `sweep` removes it. (Process ids come back; locks do
not.)

**A consumer gets a view and no copy.** That is safe because freeing a tensor does not touch its
bytes: an unlinked file lives on under its mappings. Only *reuse* of a file could tear a view, so
each view holds a shared flock on its file, and a producer reuses a file only with an exclusive one,
which it takes without waiting. Reuse renames the file. A consumer that comes late with an old
reference finds no such path, or, having opened the file just before the rename, sees after locking
that the path no longer leads to it. Locks belong to open files, so a consumer that dies frees its
own.

Memory is taken with posix_fallocate before it is mapped: on a full tmpfs that is an OSError, where
a sparse file would kill the process with SIGBUS at the first write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from kubediffusion.errors import Unavailable

LOCK_SUFFIX = ".lock"
# A consumer keeps so many mappings for the next tensor in the same file: no page faults again.
CACHED_MAPPINGS = 32
_OPEN_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW


@cache
def host_id() -> str:
    """Equal for processes that see the same files: the kernel's boot id and the mount namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/mnt').st_ino}"


def size_class(nbytes: int) -> int:
    """`nbytes` rounded up to a power of two or a quarter step between two: at most 25 % waste."""
    size = max(nbytes, mmap.PAGESIZE)
    quarter = max(1 << (size - 1).bit_length() >> 3, mmap.PAGESIZE)
    return -(-size // quarter) * quarter


@dataclass(frozen=True, eq=False)
class Arena:
    """A mapped file. `memory` is all of it: uint8, writable, (size,)."""

    path: str  # and no Path, whose parsing would cost as much as all else of a get
    size: int
    memory: np.ndarray


class ArenaFolder:
    """The files of one producer. Not thread-safe except `create`; the store serialises the rest."""

    def __init__(self, root: Path, incarnation: str) -> None:
        """Raises Unavailable where the folder cannot be made."""
        self.path = root / incarnation
        self._prefix = f"{self.path}/"
        self._lock_path = root / (incarnation + LOCK_SUFFIX)
        self._serial = 0
        self._serial_lock = threading.Lock()
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = _create_locked(self._lock_path)
            self.path.mkdir(mode=0o700)
        except OSError as error:
            raise Unavailable(
                f"no folder for shared memory at {self.path}: {error.strerror}; "
                "choose another shm_dir, or none to send tensors by gRPC only",
                reason="SharedMemoryUnavailable",
            ) from error

    def create(self, size: int) -> Arena:
        """A new file of `size` bytes. Raises OSError, ENOSPC for one, and leaves nothing then."""
        path = self._next_path()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
            # The mapping keeps the file open by itself, hence one descriptor for each arena.
            mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except (OSError, ValueError):
            _unlink(path)
            raise
        finally:
            os.close(fd)
        return Arena(path, size, np.frombuffer(mapping, np.uint8))

    def reuse(self, arena: Arena) -> Arena | None:
        """The same memory under a new path, or None while somebody still looks at it."""
        try:
            fd = os.open(arena.path, os.O_RDONLY | _OPEN_FLAGS)
        except OSError:  # somebody emptied the folder
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path = self._next_path()
            os.rename(arena.path, path)
        except BlockingIOError:
            return None
        finally:
            os.close(fd)
        return Arena(path, arena.size, arena.memory)

    def discard(self, arena: Arena) -> None:
        """Frees the memory, as soon as the last view of it is gone."""
        _unlink(arena.path)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock_fd)

    def _next_path(self) -> str:
        with self._serial_lock:
            self._serial += 1
            return f"{self._prefix}{self._serial}"


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _create_locked(path: Path) -> int:
    """A lock file that is ours. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A sweep between the two lines took it for garbage.
        if os.fstat(fd).st_nlink == 0:
            raise OSError(errno.ESTALE, "swept away while it was being made")
    except OSError:
        os.close(fd)
        raise
    return fd


def sweep(root: Path) -> int:
    """Removes what dead producers left under `root`; returns how many. Safe beside living ones."""
    removed = 0
    for lock_path in sorted(root.glob("*" + LOCK_SUFFIX)):
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            fd = os.open(lock_path, os.O_RDWR | _OPEN_FLAGS)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock_path.with_suffix(""), ignore_errors=True)
                lock_path.unlink(missing_ok=True)
                removed += 1
            finally:
                os.close(fd)
    # A folder is made after its lock and removed before it: without one it is garbage too.
    for folder in [path for path in root.glob("*") if path.is_dir()]:
        if not folder.with_suffix(LOCK_SUFFIX).exists():
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


class Mappings:
    """A consumer's mapped files, kept while their producer keeps them. Thread-safe."""

    def __init__(self, limit: int = CACHED_MAPPINGS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._cached: OrderedDict[tuple[int, int], tuple[mmap.mmap, int]] = OrderedDict()

    def view(self, path: str, nbytes: int) -> np.ndarray | None:
        """The file's first bytes, read-only, uint8 (nbytes,); None if it is gone or reused.

        The file is not reused while the array, or anything made from it without a copy, is alive.
        Raises OSError where the file is there and cannot be mapped.
        """
        try:
            fd = os.open(path, os.O_RDONLY | _OPEN_FLAGS)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            mapping = self._mapping(path, fd)
            if mapping is None or len(mapping) < nbytes:
                os.close(fd)
                return None
        except (FileNotFoundError, BlockingIOError):  # about to be reused
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        view = np.frombuffer(mapping, np.uint8, nbytes)
        # Slices and reshapes keep `view` alive: numpy stops at the array that is over the mapping.
        weakref.finalize(view, os.close, fd).atexit = False
        return view

    def trim(self) -> None:
        """Lets go of files that their producers have removed, which frees their memory."""
        with self._lock:
            for key, (_, fd) in list(self._cached.items()):
                if os.fstat(fd).st_nlink == 0:
                    self._drop(key)

    def close(self) -> None:
        with self._lock:
            for key in list(self._cached):
                self._drop(key)

    def _mapping(self, path: str, locked_fd: int) -> mmap.mmap | None:
        mine, there = os.fstat(locked_fd), os.stat(path, follow_symlinks=False)
        key = (mine.st_dev, mine.st_ino)
        if key != (there.st_dev, there.st_ino):
            return None
        self.trim()
        with self._lock:
            if key in self._cached:
                self._cached.move_to_end(key)
                return self._cached[key][0]
            # Opened anew: a mapping keeps its open file, and with it that file's lock, alive.
            fd = os.open(path, os.O_RDONLY | _OPEN_FLAGS)
            try:
                mapping = mmap.mmap(fd, mine.st_size, mmap.MAP_SHARED, mmap.PROT_READ)
            except BaseException:
                os.close(fd)
                raise
            self._cached[key] = (mapping, fd)
            while len(self._cached) > self._limit:
                self._drop(next(iter(self._cached)))
            return mapping

    def _drop(self, key: tuple[int, int]) -> None:
        os.close(self._cached.pop(key)[1])
