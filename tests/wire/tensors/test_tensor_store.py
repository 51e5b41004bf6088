# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The store of one process: what it keeps, for how long, and what it leaves behind."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kubediffusion.errors import Cancelled, Internal, Overloaded, TensorLost, Unavailable
from kubediffusion.tensors import Scope, TensorStore, arena, sweep
from kubediffusion.v1alpha1 import tensor_pb2

U8 = tensor_pb2.DTYPE_U8
KIB = 1024
LARGE = 256 * KIB
SCOPE = Scope("gateway-1", "request-1")


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[TensorStore]:
    store = TensorStore("n", budget_bytes=8 * 1024 * KIB, shm_dir=tmp_path / "shm", now=clock)
    yield store
    store.close()


@pytest.fixture
def private(clock: Clock) -> TensorStore:
    return TensorStore("n", budget_bytes=1024 * KIB, now=clock)


def put(
    store: TensorStore, fill: int = 1, size: int = LARGE, scope: Scope = SCOPE
) -> tensor_pb2.TensorRef:
    return store.put(scope, "task/port/1", np.full(size, fill, np.uint8), (size,), U8)


def files(store: TensorStore) -> list[Path]:
    assert store.shm_dir is not None
    return [p for p in store.shm_dir.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_small_tensor_travels_in_its_reference_and_is_not_kept(store: TensorStore) -> None:
    ref = put(store, 7, 64 * KIB)
    assert ref.inline == b"\x07" * 64 * KIB
    assert not ref.address
    assert store.stats().tensors == 0


def test_a_small_tensor_is_kept_where_inline_is_not_allowed(store: TensorStore) -> None:
    ref = store.put(SCOPE, "a/b/1", b"abcd", (4,), U8, inline=False)
    assert not ref.HasField("inline")
    assert bytes(store.get(ref.id)) == b"abcd"


def test_a_large_tensor_lies_in_a_file_and_is_read_without_a_copy(store: TensorStore) -> None:
    store.address = "unix:/somewhere"
    ref = put(store, 9)
    assert (ref.address, ref.incarnation) == ("unix:/somewhere", store.incarnation)
    path = Path(ref.shared_memory.path)
    assert path.stat().st_size >= LARGE
    view = store.get(ref.id)
    assert view.nbytes == LARGE
    assert not view.flags.writeable
    path.write_bytes(b"\x05" * LARGE)  # through the file: the view sees it
    assert (view == 5).all()


def test_any_contiguous_or_strided_array_arrives_row_major(store: TensorStore) -> None:
    array = np.arange(2 * 300 * 200, dtype=np.float32).reshape(2, 300, 200).transpose(0, 2, 1)
    ref = store.put(SCOPE, "t/p/1", array, array.shape, tensor_pb2.DTYPE_F32)
    back = store.get(ref.id).view(np.float32).reshape(array.shape)
    np.testing.assert_array_equal(back, array)


def test_a_shape_that_does_not_fit_the_bytes_is_our_bug(store: TensorStore) -> None:
    with pytest.raises(Internal, match="no tensor of shape"):
        store.put(SCOPE, "t/p/1", b"abc", (4,), U8)


def test_ids_are_unique_even_under_one_name(store: TensorStore) -> None:
    assert put(store).id != put(store).id


def test_release_frees_a_request_and_no_other(store: TensorStore) -> None:
    mine, other = put(store), put(store, scope=Scope("gateway-1", "request-2"))
    store.release("gateway-1", ["request-1", "never-seen"])
    with pytest.raises(TensorLost) as info:
        store.get(mine.id)
    assert info.value.tensor_ids == (mine.id,)
    assert (store.get(other.id) == 1).all()
    assert store.stats().tensors == 1
    assert store.stats().nbytes == LARGE


def test_discard_frees_one_tensor_and_is_idempotent(store: TensorStore) -> None:
    first, second = put(store, 1), put(store, 2)
    store.discard(first.id)
    store.discard(first.id)
    with pytest.raises(TensorLost):
        store.get(first.id)
    assert (store.get(second.id) == 2).all()
    assert store.stats().nbytes == LARGE


def test_a_late_put_of_a_released_request_is_refused_and_leaves_nothing(
    store: TensorStore,
) -> None:
    store.release("gateway-1", ["request-1"])
    with pytest.raises(Cancelled, match="request-1"):
        put(store)
    assert store.stats().tensors == 0


def test_a_request_that_is_released_while_it_puts_leaves_nothing(
    store: TensorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = np.copyto

    def releasing(*args: object) -> None:
        copied(*args)  # type: ignore[arg-type]
        store.release("gateway-1", ["request-1"])

    monkeypatch.setattr(np, "copyto", releasing)
    with pytest.raises(Cancelled):
        put(store)
    assert store.stats().nbytes == 0


def test_an_admitted_request_may_come_again_under_its_old_id(store: TensorStore) -> None:
    store.release("gateway-1", ["request-1"])
    store.admit(SCOPE)
    assert (store.get(put(store, 3).id) == 3).all()


def test_a_silent_gateway_loses_its_tensors_and_a_living_one_keeps_them(
    store: TensorStore, clock: Clock
) -> None:
    store.touch("gateway-1", 30)
    store.touch("gateway-2", 30)
    lost, kept = put(store), put(store, scope=Scope("gateway-2", "r"))
    clock.time += 20
    store.touch("gateway-2")
    clock.time += 9.9
    assert store.expire() == ()
    clock.time += 0.1
    assert store.expire() == ("gateway-1",)
    with pytest.raises(TensorLost):
        store.get(lost.id)
    assert store.get(kept.id).nbytes == LARGE


def test_a_tensor_of_a_gateway_that_never_spoke_lapses_too(
    store: TensorStore, clock: Clock
) -> None:
    put(store)
    clock.time += 31
    assert store.expire() == ("gateway-1",)
    assert store.stats().tensors == 0


def test_a_freed_file_is_used_again_under_another_path(store: TensorStore) -> None:
    first = put(store, 1)
    inode = os.stat(first.shared_memory.path).st_ino
    store.release("gateway-1", ["request-1"])
    second = put(store, 2, scope=Scope("gateway-1", "request-2"))
    assert os.stat(second.shared_memory.path).st_ino == inode
    assert not Path(first.shared_memory.path).exists()
    assert len(files(store)) == 1


def test_a_view_stays_good_after_release_and_reuse(store: TensorStore) -> None:
    view = store.get(put(store, 1).id)
    part = view[100:200].reshape(10, 10)
    store.release("gateway-1", ["request-1"])
    del view  # what was made from it keeps the file from reuse
    put(store, 2, scope=Scope("gateway-1", "request-2"))
    assert (part == 1).all()
    del part
    store.release("gateway-1", ["request-2"])
    put(store, 3, scope=Scope("gateway-1", "request-3"))
    assert len(files(store)) == 2


def test_beyond_the_budget_a_put_is_refused_until_something_is_freed(store: TensorStore) -> None:
    refs = [put(store, size=1024 * KIB) for _ in range(8)]
    with pytest.raises(Overloaded, match="budget") as info:
        put(store, size=1024 * KIB)
    assert info.value.reason == "OutOfTensorMemory"
    assert store.stats().nbytes == 8 * 1024 * KIB
    store.discard(refs[0].id)
    put(store, size=1024 * KIB)


def test_warm_files_of_another_size_give_way(store: TensorStore) -> None:
    for size in (4096 * KIB, 2048 * KIB, 1024 * KIB):
        put(store, size=size)
    store.release("gateway-1", ["request-1"])
    put(store, size=8192 * KIB, scope=Scope("gateway-1", "request-2"))
    assert store.stats().held_bytes == 8192 * KIB
    assert len(files(store)) == 1


def test_a_full_shared_memory_falls_back_to_private_memory(
    store: TensorStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arena.os, "posix_fallocate", full)
    refs = [put(store, fill) for fill in (1, 2)]
    assert not refs[0].HasField("shared_memory")
    assert [int(store.get(ref.id)[0]) for ref in refs] == [1, 2]
    assert files(store) == []
    assert caplog.text.count("No space left") == 1
    assert store.stats().held_bytes == 2 * LARGE
    store.release("gateway-1", ["request-1"])
    assert store.stats().held_bytes == 0


def test_without_a_folder_everything_is_private(private: TensorStore) -> None:
    ref = put(private, 4)
    assert not ref.HasField("shared_memory")
    view = private.get(ref.id)
    private.release("gateway-1", ["request-1"])
    assert (view == 4).all()
    assert not view.flags.writeable
    assert private.stats().held_bytes == 0


def test_the_number_of_files_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubediffusion.tensors.store._max_files", lambda: 3)
    store = TensorStore("n", budget_bytes=2**30, shm_dir=tmp_path)
    refs = [put(store, fill) for fill in range(5)]
    assert [ref.HasField("shared_memory") for ref in refs] == [True, True, True, False, False]
    assert [int(store.get(ref.id)[0]) for ref in refs] == list(range(5))
    store.release("gateway-1", ["request-1"])
    # A warm file of another size makes place.
    assert put(store, 1, 2 * LARGE, Scope("g", "r")).HasField("shared_memory")
    store.close()


def test_nothing_is_left_after_close_and_views_stay_good(tmp_path: Path) -> None:
    store = TensorStore("n", budget_bytes=2**30, shm_dir=tmp_path)
    put(store, 1)
    view = store.get(put(store, 2).id)
    store.close()
    store.close()
    assert list(tmp_path.iterdir()) == []
    assert (view == 2).all()
    assert store.stats().held_bytes == 0
    with pytest.raises(Cancelled):
        put(store)


def test_descriptors_do_not_leak(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    store = TensorStore("n", budget_bytes=2**30, shm_dir=tmp_path)
    for number in range(50):
        view = store.get(put(store, number, scope=Scope("g", str(number))).id)
        store.release("g", [str(number)])
        del view
    store.close()
    del store
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="shm_dir"):
        TensorStore("n", budget_bytes=1, shm_dir=tmp_path / "file" / "shm")


def test_a_sweep_spares_the_living(store: TensorStore) -> None:
    ref = put(store, 6)
    assert store.shm_dir is not None
    assert sweep(store.shm_dir) == 0
    assert (store.get(ref.id) == 6).all()


def test_many_threads_put_get_and_release_without_a_torn_byte(store: TensorStore) -> None:
    wrong: list[str] = []

    def work(thread: int) -> None:
        for turn in range(60):
            scope = Scope("g", f"{thread}-{turn}")
            ref = put(store, fill := (thread * 61 + turn) % 251, 128 * KIB, scope)
            view = store.get(ref.id)
            store.release("g", [scope.request_id])
            if not (view == fill).all():
                wrong.append(ref.id)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.stats().tensors == 0


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, 65_537, 100_000, 2**20, 2**20 + 1, 3 * 2**26])
def test_size_classes_waste_a_quarter_at_most(nbytes: int) -> None:
    size = arena.size_class(nbytes)
    assert size >= nbytes
    assert size % 4096 == 0
    assert size <= max(nbytes * 1.25, 4096 * 2)
