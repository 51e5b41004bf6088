# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors from one process to another, by each way there is."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
from producer import Producer, serve

from kubediffusion import rpc
from kubediffusion.errors import InvalidInput, TensorLost
from kubediffusion.tensors import Fetcher, Scope, TensorStore, fetch, sweep
from kubediffusion.v1alpha1 import node_pb2_grpc, tensor_pb2

SIZE = 3 * 2**20 + 17
U8 = tensor_pb2.DTYPE_U8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shm")


@pytest.fixture(scope="module")
def producer(folder: Path) -> Iterator[Producer]:
    """Tests share it, since a process takes a second; those that end it start their own."""
    producer = Producer(folder)
    yield producer
    producer.close()
    assert list(folder.glob("*/*")) == []


@pytest.fixture
async def mapping(folder: Path) -> AsyncIterator[Fetcher]:
    """A consumer on the producer's host."""
    fetcher = Fetcher(shm_dir=folder)
    yield fetcher
    await fetcher.close()


@pytest.fixture
async def remote() -> AsyncIterator[Fetcher]:
    """A consumer elsewhere: gRPC is its only way."""
    fetcher = Fetcher()
    yield fetcher
    await fetcher.close()


def without_address(ref: tensor_pb2.TensorRef) -> tensor_pb2.TensorRef:
    """So that only shared memory can answer."""
    copy = tensor_pb2.TensorRef()
    copy.CopyFrom(ref)
    copy.ClearField("address")
    return copy


def link_to_secret(path: Path, folder: Path) -> None:
    (folder / "secret").write_bytes(b"\x09" * SIZE)
    path.unlink()
    path.symlink_to(folder / "secret")


async def test_a_small_tensor_is_in_its_reference(remote: Fetcher) -> None:
    ref = TensorStore("n", budget_bytes=0).put(Scope("g", "r"), "a", b"abcd", (2, 2), U8)
    assert (await remote.fetch_array(ref)).tolist() == [[97, 98], [99, 100]]


async def test_one_host_shares_memory(producer: Producer, mapping: Fetcher) -> None:
    data = await mapping.fetch(without_address(producer.put(7, SIZE)))
    assert data.nbytes == SIZE
    assert (data == 7).all()
    assert not data.flags.writeable


async def test_another_host_gets_the_bytes_by_grpc(producer: Producer, remote: Fetcher) -> None:
    ref = producer.put(7, SIZE)
    one, two = await asyncio.gather(remote.fetch(ref), remote.fetch(ref))
    for data in (one, two):
        assert data.nbytes == SIZE
        assert (data == 7).all()
        assert not data.flags.writeable


async def test_a_unix_socket_serves_too(tmp_path: Path, remote: Fetcher) -> None:
    producer = Producer(None, f"unix:{tmp_path}/fetch.sock")
    ref = producer.put(5, SIZE)
    assert not ref.HasField("shared_memory")
    assert ((await remote.fetch(ref)) == 5).all()
    producer.close()


@pytest.mark.parametrize("change", ["host_id", "path", "incarnation", "dots", "name"])
async def test_a_file_that_is_not_the_producers_is_never_opened(
    producer: Producer, mapping: Fetcher, folder: Path, change: str
) -> None:
    ref = without_address(producer.put(7, SIZE))
    secret = folder / "secret"
    secret.write_bytes(b"\x09" * SIZE)
    match change:
        case "host_id":
            ref.shared_memory.host_id = "another boot"
        case "path":
            ref.shared_memory.path = str(secret)
        case "incarnation":
            ref.incarnation = "another"
        case "dots":
            ref.incarnation = ".."
            (folder.parent / "1").write_bytes(b"\x09" * SIZE)
            ref.shared_memory.path = f"{folder}/../1"
        case "name":
            beside = Path(ref.shared_memory.path).parent / "secret"
            beside.write_bytes(b"\x09" * SIZE)
            ref.shared_memory.path = str(beside)
    with pytest.raises(TensorLost):
        await mapping.fetch(ref)


async def test_a_link_in_the_folder_is_not_followed(
    producer: Producer, mapping: Fetcher, folder: Path
) -> None:
    ref = without_address(producer.put(7, SIZE))
    link_to_secret(Path(ref.shared_memory.path), folder)
    with pytest.raises(TensorLost):
        await mapping.fetch(ref)


async def test_a_file_that_is_gone_is_asked_for(producer: Producer, mapping: Fetcher) -> None:
    ref = producer.put(7, SIZE)
    ref.shared_memory.path += "0"
    assert ((await mapping.fetch(ref)) == 7).all()


async def test_a_released_tensor_is_lost_by_its_id(producer: Producer, remote: Fetcher) -> None:
    ref = producer.put(7, SIZE)
    producer.release(ref)
    with pytest.raises(TensorLost, match="freed") as info:
        await remote.fetch(ref)
    assert info.value.tensor_ids == (ref.id,)


async def test_a_restarted_producer_is_not_asked_for_what_it_never_had(
    tmp_path: Path, remote: Fetcher
) -> None:
    address = f"unix:{tmp_path}/fetch.sock"
    first = Producer(None, address)
    ref = first.put(1, SIZE)
    first.kill()
    second = Producer(None, address)
    assert second.put(2, SIZE).id == ref.id
    with pytest.raises(TensorLost, match="started anew") as info:
        await remote.fetch(ref)
    assert info.value.tensor_ids == (ref.id,)
    second.close()


async def test_a_dead_producer_is_a_lost_tensor(remote: Fetcher) -> None:
    producer = Producer(None)
    ref = producer.put(1, SIZE)
    producer.kill()
    with pytest.raises(TensorLost, match="cannot be had") as info:
        await remote.fetch(ref)
    assert info.value.tensor_ids == (ref.id,)


async def test_a_view_outlives_release_reuse_and_death_of_its_producer(tmp_path: Path) -> None:
    producer, mapping = Producer(tmp_path), Fetcher(shm_dir=tmp_path)
    refs = [producer.put(1, SIZE), producer.put(2, SIZE)]
    first = await mapping.fetch(refs[0])
    second = (await mapping.fetch(refs[1]))[:1000].reshape(10, 100)
    for ref in refs:
        producer.release(ref)
    for number in range(3, 6):
        producer.put(number, SIZE)
    producer.kill()
    await mapping.close()
    assert (first == 1).all()
    assert (second == 2).all()


async def test_an_old_reference_never_gives_the_next_tensors_bytes(
    producer: Producer, mapping: Fetcher
) -> None:
    old = producer.put(1, SIZE)
    view = await mapping.fetch(old)
    inode = os.stat(old.shared_memory.path).st_ino
    del view
    producer.release(old)
    new = producer.put(2, SIZE)
    assert os.stat(new.shared_memory.path).st_ino == inode
    with pytest.raises(TensorLost):
        await mapping.fetch(old)
    assert ((await mapping.fetch(new)) == 2).all()


async def test_bytes_are_never_torn_while_the_producer_reuses_its_files(
    producer: Producer, mapping: Fetcher
) -> None:
    """Each tensor has one value, and a view that is held over the next puts keeps it."""
    held: list[tuple[int, np.ndarray]] = []
    for turn in range(40):
        ref = producer.put(turn, 128 * 1024)
        producer.release(ref)
        # Released, and readable until the file is used again.
        held.append((turn, await mapping.fetch(without_address(ref))))
        for value, view in held:
            assert (view == value).all()
        del held[:-3]


def test_kill_9_leaves_files_that_a_sweep_removes(tmp_path: Path) -> None:
    dead, living = Producer(tmp_path), Producer(tmp_path)
    dead.put(1, SIZE)
    kept = living.put(2, SIZE)
    dead.kill()
    assert sweep(tmp_path) == 1
    assert Path(kept.shared_memory.path).exists()
    assert len(list(tmp_path.iterdir())) == 2
    living.close()
    assert list(tmp_path.iterdir()) == []
    assert sweep(tmp_path) == 0


def test_a_folder_without_a_lock_is_garbage(tmp_path: Path) -> None:
    (tmp_path / "0123").mkdir()
    (tmp_path / "0123" / "1").write_bytes(b"x")
    assert sweep(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_needs_no_sweep(tmp_path: Path) -> None:
    assert sweep(tmp_path / "none") == 0


def test_a_consumer_that_dies_gives_the_file_back(tmp_path: Path) -> None:
    """Its lock goes with it: the producer may use the file again."""
    store = TensorStore("n", budget_bytes=2**30, shm_dir=tmp_path)
    ref = store.put(Scope("g", "a"), "t", np.full(SIZE, 1, np.uint8), (SIZE,), U8)
    path = ref.shared_memory.path
    inode = os.stat(path).st_ino
    code = (
        "import sys; from kubediffusion.tensors.arena import Mappings\n"
        "view = Mappings().view(sys.argv[1], 10); print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    consumer = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=pipe, stdout=pipe, text=True
    )
    assert consumer.stdout is not None
    assert consumer.stdout.readline() == "held\n"
    store.release("g", ["a"])
    second = store.put(Scope("g", "b"), "t", np.full(SIZE, 2, np.uint8), (SIZE,), U8)
    assert os.stat(second.shared_memory.path).st_ino != inode
    consumer.kill()
    consumer.wait()
    third = store.put(Scope("g", "c"), "t", np.full(SIZE, 3, np.uint8), (SIZE,), U8)
    assert os.stat(third.shared_memory.path).st_ino == inode
    store.close()


async def test_a_relative_folder_is_the_same_for_everyone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = TensorStore("n", budget_bytes=2**30, shm_dir=Path("shm"))
    ref = store.put(Scope("g", "r"), "t", np.full(SIZE, 4, np.uint8), (SIZE,), U8)
    fetcher = Fetcher(shm_dir=Path("shm"))
    monkeypatch.chdir("/")
    assert ((await fetcher.fetch(without_address(ref))) == 4).all()
    await fetcher.close()
    store.close()


async def test_in_one_process_nothing_is_copied_or_sent(tmp_path: Path) -> None:
    for shm_dir in (None, tmp_path):
        store = TensorStore("n", budget_bytes=2**30, shm_dir=shm_dir)
        fetcher = Fetcher(store)
        ref = store.put(Scope("g", "r"), "t", np.full(SIZE, 4, np.uint8), (SIZE,), U8)
        one, two = await fetcher.fetch(ref), await fetcher.fetch(ref)
        assert np.shares_memory(one, two)
        assert (one == 4).all()
        store.release("g", ["r"])
        with pytest.raises(TensorLost):
            await fetcher.fetch(ref)
        await fetcher.close()
        store.close()


async def test_a_part_of_a_tensor_can_be_asked_for() -> None:
    store = TensorStore("n", budget_bytes=2**30)
    server = await serve(store, "127.0.0.1:0")
    data = np.arange(SIZE, dtype=np.uint32).view(np.uint8)[:SIZE]
    ref = store.put(Scope("g", "r"), "t", data, (SIZE,), U8)
    request = tensor_pb2.FetchRequest(tensor_id=ref.id, offset=100, length=2**20)
    async with rpc.connect(ref.address) as channel:
        stub = node_pb2_grpc.ModelNodeStub(channel)
        got = b"".join([chunk.data async for chunk in stub.Fetch(request, timeout=60)])
    assert got == data[100 : 100 + 2**20].tobytes()
    await server.stop(0)


async def test_a_fetch_that_is_given_up_leaves_the_fetcher_usable(
    producer: Producer, remote: Fetcher
) -> None:
    ref = producer.put(6, 32 * 2**20)
    task = asyncio.create_task(remote.fetch(ref))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ((await remote.fetch(ref)) == 6).all()


async def test_channels_are_bounded_and_reused(
    tmp_path: Path, remote: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MAX_CHANNELS", 2)
    servers, refs = [], []
    for number in range(4):
        store = TensorStore(str(number), budget_bytes=2**30)
        servers.append(await serve(store, f"unix:{tmp_path}/{number}"))
        data = np.full(SIZE, number, np.uint8)
        refs.append(store.put(Scope("g", "r"), "t", data, (SIZE,), U8))
    for _ in range(2):
        got = [int((await remote.fetch(ref))[-1]) for ref in refs]
        assert got == [0, 1, 2, 3]
        assert len(remote._channels) == 2
    for server in servers:
        await server.stop(0)


async def test_memory_that_was_received_into_is_used_again_once_nobody_looks(
    producer: Producer, remote: Fetcher
) -> None:
    ref = producer.put(1, SIZE)
    first = await remote.fetch(ref)
    where = first.ctypes.data
    part = first[5:10]
    del first
    second = await remote.fetch(producer.put(2, SIZE))
    assert second.ctypes.data != where
    assert (part == 1).all()
    del part
    third = await remote.fetch(ref)
    assert third.ctypes.data == where


@pytest.mark.parametrize(
    "change",
    [{"nbytes": SIZE + 1}, {"dtype": tensor_pb2.DTYPE_F32}, {"dtype": 99}, {"inline": b"short"}],
)
async def test_a_reference_that_contradicts_itself_is_refused(
    producer: Producer, mapping: Fetcher, change: dict[str, object]
) -> None:
    ref = producer.put(1, SIZE)
    ref.MergeFrom(tensor_pb2.TensorRef(**change))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput):
        await mapping.fetch(ref)


async def test_a_producer_that_sends_another_size_is_not_believed(
    producer: Producer, remote: Fetcher
) -> None:
    ref = producer.put(1, SIZE)
    for size in (SIZE - 1, SIZE + 1):
        wrong = tensor_pb2.TensorRef()
        wrong.CopyFrom(ref)
        wrong.shape[:] = [size]
        wrong.nbytes = size
        with pytest.raises(TensorLost):
            await remote.fetch(wrong)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2_097_152])
def test_a_chunk_is_read_without_a_copy_and_as_protobuf_reads_it(size: int) -> None:
    message = tensor_pb2.FetchChunk(data=bytes(range(256)) * (size // 256 + 1)).SerializeToString()
    message = tensor_pb2.FetchChunk(data=message[:size]).SerializeToString()
    data = fetch._payload(message) if size else np.frombuffer(b"", np.uint8)
    assert data.tobytes() == tensor_pb2.FetchChunk.FromString(message).data


def test_a_chunk_with_fields_of_a_later_version_is_read_too() -> None:
    message = tensor_pb2.FetchChunk(data=b"abc").SerializeToString() + b"\x10\x05"
    assert fetch._payload(message).tobytes() == b"abc"
