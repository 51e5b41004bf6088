# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Where a node keeps the tensors it has made, until their request or their gateway is gone."""

from __future__ import annotations

import logging
import resource
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np

from kubediffusion.errors import Cancelled, Internal, Overloaded, TensorLost
from kubediffusion.tensors.arena import Arena, ArenaFolder, Mappings, host_id, size_class
from kubediffusion.tensors.values import nbytes_of
from kubediffusion.v1alpha1 import tensor_pb2

INLINE_BYTES = 64 * 1024
LEASE_SECONDS = 30.0
# So many ended requests are remembered, to refuse what a late task of theirs still puts.
REMEMBERED_RELEASES = 16_384

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scope:
    """Who a tensor is for. It is freed with its request, or when the gateway falls silent."""

    gateway_id: str
    request_id: str


@dataclass(frozen=True)
class StoreStats:
    """`nbytes` are the live tensors' own; `held_bytes` all memory taken, for reuse too."""

    tensors: int
    nbytes: int
    held_bytes: int


@dataclass(frozen=True, eq=False)
class _Entry:
    scope: Scope
    nbytes: int
    arena: Arena | None  # in shared memory, or
    private: np.ndarray | None  # in this process


class TensorStore:
    """The tensors of one node process. Thread-safe; `put` copies outside its lock.

    Up to `INLINE_BYTES` a tensor travels within its reference and is not stored. A larger one is
    copied once, into a shared memory file under `shm_dir`, or into this process' own memory where
    there is no `shm_dir`, it is full, or there would be too many files; that one is served by
    `serve_fetch` alone.

    Freed files stay as warm arenas for the next tensor of their size class, up to `budget_bytes`
    for everything together.
    """

    def __init__(
        self,
        node_id: str,
        *,
        budget_bytes: int,
        shm_dir: Path | None = None,
        address: str = "",
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.node_id = node_id
        # Where Fetch is answered; set once the server listens, before the first `put`.
        self.address = address
        self.incarnation = uuid4().hex
        # References carry paths, which must mean the same from another working directory.
        self.shm_dir = shm_dir.absolute() if shm_dir is not None else None
        self.budget_bytes = budget_bytes
        self._now = now
        self._lock = threading.Lock()
        self._folder = (
            ArenaFolder(self.shm_dir, self.incarnation) if self.shm_dir is not None else None
        )
        self._max_files = _max_files()
        self._files = 0
        # Views of files, this node's and others': the node's fetcher uses them too, and `expire`
        # lets go of what their producers have removed.
        self.mappings = Mappings()
        self._warned = False
        self._closed = False

        self._entries: dict[str, _Entry] = {}
        self._scopes: dict[Scope, list[str]] = defaultdict(list)
        self._released: OrderedDict[Scope, None] = OrderedDict()
        self._leases: dict[str, tuple[float, float]] = {}  # gateway: (expires, seconds)
        self._pool: dict[int, list[Arena]] = defaultdict(list)  # free arenas by size
        self._held = 0
        self._live = 0
        self._serial = 0

    # ------------------------------------------------------------ putting and getting

    def put(
        self,
        scope: Scope,
        name: str,
        data: np.ndarray | bytes | memoryview,
        shape: Sequence[int],
        dtype: tensor_pb2.DType,
        *,
        inline: bool = True,
    ) -> tensor_pb2.TensorRef:
        """Keeps a row-major tensor for `scope`; `name` is "<task>/<port>/<epoch>".

        Raises Overloaded, reason OutOfTensorMemory, beyond the budget, and Cancelled where the
        request was released meanwhile.
        """
        flat = _flat(data)
        if flat.nbytes != nbytes_of(shape, dtype):
            raise Internal(f"{name}: {flat.nbytes} bytes are no tensor of shape {tuple(shape)}")
        ref = tensor_pb2.TensorRef(
            shape=shape, dtype=dtype, nbytes=flat.nbytes, incarnation=self.incarnation
        )
        ref.id = self._next_id(scope, name)
        if inline and flat.nbytes <= INLINE_BYTES:
            ref.inline = flat.tobytes()
            return ref
        entry = self._store(scope, flat)
        self._register(ref.id, entry)
        ref.address = self.address
        if entry.arena is not None:
            ref.shared_memory.host_id = host_id()
            ref.shared_memory.path = entry.arena.path
        return ref

    def get(self, tensor_id: str) -> np.ndarray:
        """The bytes: uint8, (nbytes,), read-only, no copy; they stay good after a release.

        Raises TensorLost.
        """
        with self._lock:
            entry = self._entries.get(tensor_id)
            view = self._view(entry) if entry is not None else None
        if view is None:
            raise TensorLost(f"{tensor_id} was freed or never made here", tensor_ids=(tensor_id,))
        return view

    def _view(self, entry: _Entry) -> np.ndarray | None:
        if entry.arena is None:
            return entry.private
        return self.mappings.view(entry.arena.path, entry.nbytes)

    # ------------------------------------------------------------ lifetimes

    def admit(self, scope: Scope) -> None:
        """A task of this request is taken: a request of the same id that ended is forgotten."""
        with self._lock:
            self._released.pop(scope, None)

    def touch(self, gateway_id: str, lease_seconds: float | None = None) -> None:
        """The gateway lives: its tensors are kept for its lease from now."""
        with self._lock:
            _, seconds = self._leases.get(gateway_id, (0.0, LEASE_SECONDS))
            seconds = lease_seconds or seconds
            self._leases[gateway_id] = (self._now() + seconds, seconds)

    def expire(self) -> tuple[str, ...]:
        """Frees what belongs to gateways whose lease has lapsed; returns their ids."""
        now = self._now()
        with self._lock:
            lapsed = tuple(g for g, (expires, _) in self._leases.items() if expires <= now)
            for gateway_id in lapsed:
                del self._leases[gateway_id]
            for scope in [s for s in self._scopes if s.gateway_id in lapsed]:
                self._free(scope)
        self.mappings.trim()
        return lapsed

    def release(self, gateway_id: str, request_ids: Iterable[str]) -> None:
        """These requests are over: their tensors go, and nothing more is kept for them."""
        with self._lock:
            for request_id in request_ids:
                scope = Scope(gateway_id, request_id)
                self._free(scope)
                self._released[scope] = None
                self._released.move_to_end(scope)
            while len(self._released) > REMEMBERED_RELEASES:
                self._released.popitem(last=False)

    def discard(self, tensor_id: str) -> None:
        """Frees one tensor before its request ends, such as a checkpoint that a newer one beats."""
        with self._lock:
            if tensor_id in self._entries:
                scope = self._entries[tensor_id].scope
                self._scopes[scope].remove(tensor_id)
                if not self._scopes[scope]:
                    del self._scopes[scope]
                self._drop(tensor_id)

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(len(self._entries), self._live, self._held)

    def close(self) -> None:
        """Frees everything; views stay good. Nothing is left in `shm_dir`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for scope in list(self._scopes):
                self._free(scope)
            self._shrink(to=0)
            self._leases.clear()
            self.mappings.close()
            if self._folder is not None:
                self._folder.close()

    # ------------------------------------------------------------ inside

    def _next_id(self, scope: Scope, name: str) -> str:
        with self._lock:
            self._serial += 1
            return f"{self.node_id}/{scope.request_id}/{name}/{self._serial}"

    def _store(self, scope: Scope, flat: np.ndarray) -> _Entry:
        arena = self._take_arena(scope, flat.nbytes)
        if arena is None:
            return _Entry(scope, flat.nbytes, None, _read_only(flat.copy()))
        np.copyto(arena.memory[: flat.nbytes], flat)
        return _Entry(scope, flat.nbytes, arena, None)

    def _take_arena(self, scope: Scope, nbytes: int) -> Arena | None:
        """An arena, counted as held; None (then `nbytes` are) for private memory."""
        size = size_class(nbytes)
        with self._lock:
            self._check_open(scope)
            arena = self._reuse(size)
            if arena is not None:
                return arena
            shared = self._folder is not None and self._room_for_a_file()
            self._reserve(size if shared else nbytes)
            self._files += shared
        if self._folder is None or not shared:
            return None
        try:
            return self._folder.create(size)
        except OSError as error:
            self._warn_once(error)
            with self._lock:
                self._files -= 1
                self._held += nbytes - size
            return None

    def _reuse(self, size: int) -> Arena | None:
        free = self._pool.get(size, [])
        for index in range(len(free) - 1, -1, -1):  # the warmest first
            assert self._folder is not None
            arena = self._folder.reuse(free[index])
            if arena is not None:
                del free[index]
                return arena
        return None

    def _room_for_a_file(self) -> bool:
        if self._files >= self._max_files:
            self._shrink_files()
        return self._files < self._max_files

    def _reserve(self, nbytes: int) -> None:
        self._shrink(to=self.budget_bytes - nbytes)
        if self._held + nbytes > self.budget_bytes:
            raise Overloaded(
                f"no memory for a tensor of {nbytes} bytes: {self._held} of {self.budget_bytes} "
                "are in use; wait for requests to end, or raise the node's tensor budget",
                retry_after=1.0,
                reason="OutOfTensorMemory",
            )
        self._held += nbytes

    def _check_open(self, scope: Scope) -> None:
        if self._closed:
            raise Cancelled("the node is stopping")
        if scope in self._released:
            raise Cancelled(f"request {scope.request_id} is over; nothing is kept for it")

    def _register(self, tensor_id: str, entry: _Entry) -> None:
        scope = entry.scope
        with self._lock:
            try:
                self._check_open(scope)
            except Cancelled:
                self._give_back(entry)
                raise
            self._entries[tensor_id] = entry
            self._scopes[scope].append(tensor_id)
            self._live += entry.nbytes
            if scope.gateway_id not in self._leases:
                # Of a gateway that lapsed while its task ran: bounded all the same.
                expires = self._now() + LEASE_SECONDS
                self._leases[scope.gateway_id] = (expires, LEASE_SECONDS)

    def _free(self, scope: Scope) -> None:
        for tensor_id in self._scopes.pop(scope, ()):
            self._drop(tensor_id)

    def _drop(self, tensor_id: str) -> None:
        entry = self._entries.pop(tensor_id)
        self._live -= entry.nbytes
        self._give_back(entry)

    def _give_back(self, entry: _Entry) -> None:
        if entry.arena is None:
            self._held -= entry.nbytes
        elif self._closed:
            self._held -= entry.arena.size
        else:
            self._pool[entry.arena.size].append(entry.arena)

    def _shrink(self, to: int) -> None:
        """Drops warm arenas, the largest first, until no more than `to` bytes are held."""
        for size in sorted(self._pool, reverse=True):
            while self._held > to and self._pool[size]:
                self._drop_arena(size)
        self._pool = defaultdict(list, {s: a for s, a in self._pool.items() if a})

    def _shrink_files(self) -> None:
        for size in sorted(self._pool):
            if self._pool[size]:
                return self._drop_arena(size)
        return None

    def _drop_arena(self, size: int) -> None:
        assert self._folder is not None
        self._folder.discard(self._pool[size].pop(0))
        self._held -= size
        self._files -= 1

    def _warn_once(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "no shared memory in %s (%s): tensors go by gRPC", self.shm_dir, error.strerror
            )


def _max_files() -> int:
    """A mapped file takes a descriptor; most must remain for connections."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1024 if soft == resource.RLIM_INFINITY else min(1024, soft // 4)


def _flat(data: np.ndarray | bytes | memoryview) -> np.ndarray:
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return np.frombuffer(data, np.uint8)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array
