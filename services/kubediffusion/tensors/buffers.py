# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Warm memory to receive into: fresh pages cost as much as the copy that fills them."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import defaultdict

import numpy as np

from kubediffusion.tensors.arena import size_class

# From malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def tune_malloc() -> None:
    """For a process that moves tensors, once at its start: freed memory stays with the process.

    By default glibc gives blocks back to the kernel as soon as they are freed, and each chunk of a
    stream is paid for with page faults again: a quarter of a fetch's time. Another C library is
    left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 1024 * 1024)
        mallopt(_M_TRIM_THRESHOLD, 64 * 1024 * 1024)


class Buffers:
    """Arrays that come back by themselves when nobody looks at them any more. Thread-safe."""

    def __init__(self, warm_bytes: int) -> None:
        """No more than `warm_bytes` are kept for reuse."""
        self._limit = warm_bytes
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._held = 0
        # Reentrant: the garbage collector may end a view while this thread is in here.
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> np.ndarray:
        """uint8, (nbytes,), not cleared. The memory is free again when its last view is gone."""
        size = size_class(nbytes)
        with self._lock:
            if self._free[size]:
                memory = self._free[size].pop()
                self._held -= size
            else:
                memory = np.empty(size, np.uint8)
        # Over a buffer and not over an array, so that what is made from the view keeps the view.
        view = np.frombuffer(memory.data, np.uint8, nbytes)
        weakref.finalize(view, self._give_back, memory).atexit = False
        return view

    def _give_back(self, memory: np.ndarray) -> None:
        with self._lock:
            if self._held + memory.nbytes <= self._limit:
                self._free[memory.nbytes].append(memory)
                self._held += memory.nbytes
