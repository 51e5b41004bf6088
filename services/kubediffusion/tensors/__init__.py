# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors between processes: a store where they are made, a fetcher where they are used.

    store = TensorStore("node-1", budget_bytes=2**30, shm_dir=Path("/dev/shm/run"))
    ref = store.put(Scope(gateway_id, request_id), "denoise/latents/1", array, array.shape, F32)
    data = await Fetcher(shm_dir=Path("/dev/shm/run")).fetch_array(ref)     # in another process

Messages carry the reference; the bytes take the cheapest way by themselves.
"""

from kubediffusion.tensors.arena import host_id, sweep
from kubediffusion.tensors.buffers import tune_malloc
from kubediffusion.tensors.fetch import Fetcher, serve_fetch
from kubediffusion.tensors.store import INLINE_BYTES, Scope, StoreStats, TensorStore
from kubediffusion.tensors.values import (
    WireValue,
    as_array,
    dtype_name,
    dtype_of,
    encode_value,
    nbytes_of,
    numpy_dtype,
    references,
    stored,
    value_of,
)

__all__ = [
    "INLINE_BYTES",
    "Fetcher",
    "Scope",
    "StoreStats",
    "TensorStore",
    "WireValue",
    "as_array",
    "dtype_name",
    "dtype_of",
    "encode_value",
    "host_id",
    "nbytes_of",
    "numpy_dtype",
    "references",
    "serve_fetch",
    "stored",
    "sweep",
    "tune_malloc",
    "value_of",
]
