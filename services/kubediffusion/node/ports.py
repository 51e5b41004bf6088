# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Port values and checkpoints between a model family and the wire."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from kubediffusion import tensors
from kubediffusion.errors import InvalidInput
from kubediffusion.models.base import CheckpointState, PortValue, StepCache
from kubediffusion.tensors import Scope, TensorStore
from kubediffusion.v1alpha1 import node_pb2, tensor_pb2

# No port of any workflow is larger; a reference that says so is nonsense.
MAX_TENSOR_BYTES = 8 * 2**30
CHANNELS_LAST = "channels_last"

Arrays = dict[str, np.ndarray]


def check(ref: tensor_pb2.TensorRef) -> None:
    """Raises InvalidInput for a reference that no tensor can have."""
    if any(n < 0 for n in ref.shape) or ref.nbytes > MAX_TENSOR_BYTES:
        raise InvalidInput(f"tensor {ref.id!r} of shape {list(ref.shape)} cannot be")
    if ref.nbytes != tensors.nbytes_of(ref.shape, ref.dtype):
        raise InvalidInput(f"tensor {ref.id}: {ref.nbytes} bytes are not its shape's")
    if ref.memory_format and (ref.memory_format != CHANNELS_LAST or len(ref.shape) != 4):
        raise InvalidInput(
            f"tensor {ref.id} of shape {list(ref.shape)} cannot be {ref.memory_format!r}"
        )


def inline_array(ref: tensor_pb2.TensorRef) -> np.ndarray:
    if len(ref.inline) != ref.nbytes:
        raise InvalidInput(f"{ref.id}: {len(ref.inline)} bytes came inline, not {ref.nbytes}")
    return tensors.as_array(np.frombuffer(ref.inline, np.uint8), ref)


def decode(value: tensor_pb2.Value, fetched: Mapping[str, np.ndarray]) -> PortValue:
    """A port's value as a family takes it; `fetched` has the tensors that did not come inline."""
    kind = value.WhichOneof("kind")
    if kind == "tensor":
        return tensor(value.tensor, fetched)
    if kind == "list":
        return [decode(item, fetched) for item in value.list.values]
    plain = tensors.value_of(value)
    assert isinstance(plain, str | int | float | bool | bytes)
    return plain


def tensor(ref: tensor_pb2.TensorRef, fetched: Mapping[str, np.ndarray]) -> torch.Tensor:
    """A copy in this process' own memory: what was fetched may be its producer's."""
    array = inline_array(ref) if ref.HasField("inline") else fetched[ref.id]
    own = torch.from_numpy(array.copy())
    if ref.dtype == tensor_pb2.DTYPE_BF16:
        own = own.view(torch.bfloat16)
    if ref.memory_format != CHANNELS_LAST:
        return own
    n, c, h, w = ref.shape
    return own.view(n, h, w, c).permute(0, 3, 1, 2)


def encode(
    store: TensorStore, scope: Scope, name: str, value: PortValue, *, inline: bool = True
) -> tensor_pb2.Value:
    """For the wire: small tensors inline, larger ones kept in `store`. `name` ends the ids."""
    if isinstance(value, torch.Tensor | np.ndarray):
        array, dtype = plain(value)
        ref = store.put(scope, name, array, array.shape, dtype, inline=inline)
        _describe(ref, value)
        return tensor_pb2.Value(tensor=ref)
    if isinstance(value, list):
        items = [
            encode(store, scope, f"{name}.{i}", item, inline=inline) for i, item in enumerate(value)
        ]
        return tensor_pb2.Value(list=tensor_pb2.ValueList(values=items))
    return tensors.encode_value(value)


def plain(value: torch.Tensor | np.ndarray) -> tuple[np.ndarray, tensor_pb2.DType]:
    """On the host, its bytes in their own order under its shape; bfloat16 as uint16."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value), tensors.dtype_of(value.dtype)
    host = value.detach().cpu()
    if _channels_last(value):
        host = host.permute(0, 2, 3, 1)
    host = host.contiguous()
    bits = host.view(torch.uint16) if host.dtype == torch.bfloat16 else host
    return bits.numpy().reshape(value.shape), tensors.dtype_of(str(value.dtype))


def _channels_last(value: torch.Tensor | np.ndarray) -> bool:
    """Where both orders are the same bytes, row-major is its name."""
    return (
        isinstance(value, torch.Tensor)
        and value.ndim == 4
        and not value.is_contiguous()
        and value.is_contiguous(memory_format=torch.channels_last)
    )


def _describe(ref: tensor_pb2.TensorRef, value: torch.Tensor | np.ndarray) -> None:
    if _channels_last(value):
        ref.memory_format = CHANNELS_LAST


def inline(tensor_id: str, value: torch.Tensor | np.ndarray) -> tensor_pb2.TensorRef:
    """A reference that has the bytes in it, whatever their size: it outlives this node."""
    array, dtype = plain(value)
    ref = tensor_pb2.TensorRef(
        id=tensor_id, shape=array.shape, dtype=dtype, nbytes=array.nbytes, inline=array.tobytes()
    )
    _describe(ref, value)
    return ref


def encode_checkpoint(state: CheckpointState, prefix: str, fingerprint: str) -> node_pb2.Checkpoint:
    """All of it inline: it must survive the node that made it."""
    return node_pb2.Checkpoint(
        step=state.step,
        total_steps=state.total_steps,
        tensors={name: inline(f"{prefix}/{name}", t) for name, t in state.tensors.items()},
        fingerprint=fingerprint,
    )


def step_cache_of(assign: node_pb2.Assign) -> StepCache | None:
    """The step cache that the task asks for."""
    if not assign.HasField("step_cache"):
        return None
    asked = assign.step_cache
    return StepCache(
        asked.method, asked.threshold, tuple(asked.ratios), asked.max_skip_steps, asked.retention
    )


def decode_checkpoint(
    checkpoint: node_pb2.Checkpoint, fetched: Mapping[str, np.ndarray]
) -> CheckpointState:
    return CheckpointState(
        step=checkpoint.step,
        total_steps=checkpoint.total_steps,
        tensors={name: tensor(ref, fetched) for name, ref in checkpoint.tensors.items()},
    )
