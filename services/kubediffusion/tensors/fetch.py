# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Pulling a tensor's bytes from its producer: the consumer's side, and the node's Fetch."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import grpc.aio
import numpy as np

from kubediffusion import rpc
from kubediffusion.errors import InvalidInput, TensorLost
from kubediffusion.tensors.arena import Mappings, host_id
from kubediffusion.tensors.buffers import Buffers
from kubediffusion.tensors.store import TensorStore
from kubediffusion.tensors.values import as_array, nbytes_of
from kubediffusion.v1alpha1 import tensor_pb2

# Measured: below, the event loop's work for each message dominates; above, copies miss the cache.
CHUNK_BYTES = 512 * 1024
MAX_CHANNELS = 64
# So many tensors come in at a time; a network is full with fewer.
MAX_PULLS = 4
# Received tensors that were let go keep so much memory warm for the next ones.
WARM_BYTES = 128 * 1024 * 1024
# A fetch may take this long, and longer by its size at the slowest network we would serve on.
TIMEOUT_SECONDS = 20.0
SLOWEST_BYTES_PER_SECOND = 10e6

# For channels that carry bulk: fewer HTTP/2 frames, and reads of a size that stays in the cache.
BULK_OPTIONS: rpc.Options = (
    ("grpc.http2.max_frame_size", 1024 * 1024),
    ("grpc.experimental.tcp_read_chunk_size", 64 * 1024),
    ("grpc.experimental.tcp_min_read_chunk_size", 64 * 1024),
    ("grpc.experimental.tcp_max_read_chunk_size", 64 * 1024),
)
FETCH_METHOD = "/kubediffusion.v1alpha1.ModelNode/Fetch"

log = logging.getLogger(__name__)


class Fetcher:
    """Gets the bytes of tensor references by the cheapest way that works. One event loop's.

    In this order: bytes in the reference itself; this process' own store; a file in `shm_dir` of
    the same host; a gRPC stream from the producer. Only files under `shm_dir` are ever opened,
    whatever path a reference names.

    A stream is received by a thread with grpc's blocking calls: that takes a quarter less time than
    grpc.aio, and megabytes that are copied on the event loop would hold up everything else there.
    """

    def __init__(self, store: TensorStore | None = None, shm_dir: Path | None = None) -> None:
        """`shm_dir` is the folder that the producers of this host share; the store's by default."""
        self._store = store
        if shm_dir is None and store is not None:
            shm_dir = store.shm_dir
        self._shm_dir = shm_dir.absolute() if shm_dir is not None else None
        self._mappings = store.mappings if store is not None else Mappings()
        self._buffers = Buffers(WARM_BYTES)
        self._threads = ThreadPoolExecutor(MAX_PULLS, thread_name_prefix="fetch")
        self._channels: OrderedDict[str, grpc.Channel] = OrderedDict()
        self._calls: Counter[str] = Counter()

    async def fetch(self, ref: tensor_pb2.TensorRef) -> np.ndarray:
        """The bytes: uint8, (nbytes,). Do not write into them: they may be the producer's own.

        Raises TensorLost where they are gone, or their producer is.
        """
        if ref.nbytes != nbytes_of(ref.shape, ref.dtype):
            raise InvalidInput(f"{ref.id}: {ref.nbytes} bytes are no tensor of its shape")
        if ref.HasField("inline"):
            return np.frombuffer(_whole(ref, ref.inline), np.uint8)
        if self._store is not None and ref.incarnation == self._store.incarnation:
            return self._store.get(ref.id)
        view = self._map(ref)
        return view if view is not None else await self._pull(ref)

    async def fetch_array(self, ref: tensor_pb2.TensorRef) -> np.ndarray:
        """The same with the reference's shape and type (bfloat16 as uint16)."""
        return as_array(await self.fetch(ref), ref)

    async def close(self) -> None:
        self._mappings.close()
        channels, self._channels = self._channels, OrderedDict()
        for channel in channels.values():
            channel.close()
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    def trim(self) -> None:
        """Lets go of files that their producers have removed; call now and then."""
        self._mappings.trim()

    # ------------------------------------------------------------ shared memory

    def _map(self, ref: tensor_pb2.TensorRef) -> np.ndarray | None:
        shared = ref.shared_memory
        if self._shm_dir is None or not shared.path or shared.host_id != host_id():
            return None
        folder, _, name = shared.path.rpartition("/")
        # Words of our own making only: no "..", no other folder.
        ours = folder == f"{self._shm_dir}/{ref.incarnation}"
        if not (ours and ref.incarnation.isalnum() and name.isdigit()):
            return None
        try:
            return self._mappings.view(shared.path, ref.nbytes)
        except OSError as error:
            log.debug("%s: cannot be mapped (%s); asking for it", shared.path, error)
            return None

    # ------------------------------------------------------------ gRPC

    async def _pull(self, ref: tensor_pb2.TensorRef) -> np.ndarray:
        if not ref.address:
            raise _lost(ref, "its producer has no address")
        self._calls[ref.address] += 1
        try:
            call = self._method(ref.address)(
                tensor_pb2.FetchRequest(tensor_id=ref.id, incarnation=ref.incarnation),
                timeout=TIMEOUT_SECONDS + ref.nbytes / SLOWEST_BYTES_PER_SECOND,
            )
            try:
                out = self._buffers.take(ref.nbytes)
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._threads, _receive, call, out, ref)
            finally:
                call.cancel()
        except grpc.RpcError as error:
            raise _lost(ref, str(rpc.from_rpc_error(error, ref.address))) from error
        finally:
            self._calls[ref.address] -= 1
        out.setflags(write=False)
        return out

    def _method(self, address: str) -> grpc.UnaryStreamMultiCallable:
        if address not in self._channels:
            options = rpc.CHANNEL_OPTIONS + BULK_OPTIONS
            self._channels[address] = grpc.insecure_channel(address, options=options)
        self._channels.move_to_end(address)
        idle = [a for a in self._channels if not self._calls[a]]
        for old in idle[: max(0, len(self._channels) - MAX_CHANNELS)]:
            del self._calls[old]
            self._channels.pop(old).close()
        return self._channels[address].unary_stream(
            FETCH_METHOD,
            request_serializer=tensor_pb2.FetchRequest.SerializeToString,
            response_deserializer=_payload,
        )


def _receive(call: Iterable[np.ndarray], out: np.ndarray, ref: tensor_pb2.TensorRef) -> None:
    """In a thread: fills `out`."""
    done = 0
    for piece in call:
        if done + piece.nbytes > ref.nbytes:
            raise _lost(ref, "its producer sent more than its size")
        out[done : done + piece.nbytes] = piece
        done += piece.nbytes
    if done != ref.nbytes:
        raise _lost(ref, f"its producer sent {done} of {ref.nbytes} bytes")


def _payload(message: bytes) -> np.ndarray:
    """`FetchChunk.data` without a copy, which halves a fetch's work: uint8, (n,)."""
    end, shift, length = 1, 0, 0
    while end < min(len(message), 11) and message[end] & 0x80:
        length |= (message[end] & 0x7F) << shift
        end, shift = end + 1, shift + 7
    if len(message) > end and message[0] == 0x0A:  # field 1, length-delimited
        length |= message[end] << shift
        if end + 1 + length == len(message):
            return np.frombuffer(message, np.uint8, offset=end + 1)
    return np.frombuffer(tensor_pb2.FetchChunk.FromString(message).data, np.uint8)


def _whole(ref: tensor_pb2.TensorRef, data: bytes) -> bytes:
    if len(data) != ref.nbytes:
        raise InvalidInput(f"{ref.id}: {len(data)} bytes came inline, not {ref.nbytes}")
    return data


def _lost(ref: tensor_pb2.TensorRef, why: str) -> TensorLost:
    return TensorLost(f"tensor {ref.id} cannot be had: {why}", tensor_ids=(ref.id,))


async def serve_fetch(
    store: TensorStore, request: tensor_pb2.FetchRequest, context: grpc.aio.ServicerContext
) -> AsyncIterator[tensor_pb2.FetchChunk]:
    """The node's Fetch: the bytes in chunks, or the status of TensorLost.

    The bytes stay good while this runs, whoever releases the tensor.
    """
    async with rpc.answering(context):
        if request.incarnation and request.incarnation != store.incarnation:
            raise TensorLost(
                f"{request.tensor_id} was made before this node started anew",
                tensor_ids=(request.tensor_id,),
            )
        view = store.get(request.tensor_id).data
        end = min(request.offset + request.length, len(view)) if request.length else len(view)
        for start in range(request.offset, end, CHUNK_BYTES):
            piece = view[start : min(start + CHUNK_BYTES, end)]
            yield tensor_pb2.FetchChunk(data=bytes(piece))
