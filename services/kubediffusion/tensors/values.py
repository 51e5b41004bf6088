# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Element types and port values between Python and the wire."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from kubediffusion.errors import InvalidInput
from kubediffusion.v1alpha1 import tensor_pb2

# What a `tensor_pb2.Value` holds: a tensor stays a reference until somebody fetches it.
WireValue: TypeAlias = "str | int | float | bool | bytes | tensor_pb2.TensorRef | list[WireValue]"

# bfloat16 has no numpy type; its bits travel as uint16.
_NUMPY: dict[tensor_pb2.DType, np.dtype] = {
    tensor_pb2.DTYPE_F32: np.dtype("<f4"),
    tensor_pb2.DTYPE_F16: np.dtype("<f2"),
    tensor_pb2.DTYPE_BF16: np.dtype("<u2"),
    tensor_pb2.DTYPE_U8: np.dtype("u1"),
    tensor_pb2.DTYPE_I32: np.dtype("<i4"),
    tensor_pb2.DTYPE_I64: np.dtype("<i8"),
    tensor_pb2.DTYPE_BOOL: np.dtype("?"),
    tensor_pb2.DTYPE_F64: np.dtype("<f8"),
}
_NAMES: dict[str, tensor_pb2.DType] = {
    "float32": tensor_pb2.DTYPE_F32,
    "float16": tensor_pb2.DTYPE_F16,
    "bfloat16": tensor_pb2.DTYPE_BF16,
    "uint8": tensor_pb2.DTYPE_U8,
    "int32": tensor_pb2.DTYPE_I32,
    "int64": tensor_pb2.DTYPE_I64,
    "bool": tensor_pb2.DTYPE_BOOL,
    "float64": tensor_pb2.DTYPE_F64,
}
# A numpy type's name takes longer to make than a small tensor to send.
_OF_NUMPY = {np.dtype(name): dtype for name, dtype in _NAMES.items() if name != "bfloat16"}
_DTYPE_NAMES = {dtype: name for name, dtype in _NAMES.items()}


def numpy_dtype(dtype: tensor_pb2.DType) -> np.dtype:
    """The numpy type with the same bits; bfloat16 is uint16. Raises InvalidInput if unknown."""
    try:
        return _NUMPY[dtype]
    except KeyError:
        raise InvalidInput(f"unknown tensor element type {dtype}", field="dtype") from None


def dtype_of(name: str | np.dtype) -> tensor_pb2.DType:
    """The wire's type for a name such as "bfloat16" or "torch.bfloat16", or a numpy dtype."""
    known_type = _OF_NUMPY.get(name) if isinstance(name, np.dtype) else None
    if known_type is not None:
        return known_type
    plain = str(name).removeprefix("torch.")
    try:
        return _NAMES[plain]
    except KeyError:
        known = ", ".join(_NAMES)
        raise InvalidInput(f"{plain} cannot be sent; use one of {known}", field="dtype") from None


def dtype_name(dtype: tensor_pb2.DType) -> str:
    """The name that torch and numpy share, "bfloat16" included."""
    numpy_dtype(dtype)
    return _DTYPE_NAMES[dtype]


def nbytes_of(shape: Sequence[int], dtype: tensor_pb2.DType) -> int:
    return math.prod(shape) * numpy_dtype(dtype).itemsize


def as_array(data: np.ndarray, ref: tensor_pb2.TensorRef) -> np.ndarray:
    """Fetched bytes (uint8, (nbytes,)) as the reference's shape and type, without a copy."""
    return data.view(numpy_dtype(ref.dtype)).reshape(tuple(ref.shape))


def encode_value(value: object) -> tensor_pb2.Value:
    """A port's value for the wire. Tensors go in as the TensorRef that `TensorStore.put` gave."""
    if isinstance(value, np.generic):
        value = value.item()
    match value:
        case bool():
            return tensor_pb2.Value(flag=value)
        case int():
            if not -(2**63) <= value < 2**63:
                raise InvalidInput(f"{value} does not fit into 64 bits")
            return tensor_pb2.Value(integer=value)
        case float():
            return tensor_pb2.Value(number=value)
        case str():
            return tensor_pb2.Value(text=value)
        case bytes() | bytearray() | memoryview():
            return tensor_pb2.Value(blob=bytes(value))
        case tensor_pb2.TensorRef():
            return tensor_pb2.Value(tensor=value)
        case list() | tuple():
            items = [encode_value(item) for item in value]
            return tensor_pb2.Value(list=tensor_pb2.ValueList(values=items))
    raise InvalidInput(
        f"a {type(value).__name__} cannot be sent; use text, a number, a bool, bytes or a list"
    )


def references(value: tensor_pb2.Value) -> Iterator[tensor_pb2.TensorRef]:
    """The tensors in a value, those in lists included."""
    kind = value.WhichOneof("kind")
    if kind == "tensor":
        yield value.tensor
    elif kind == "list":
        for item in value.list.values:
            yield from references(item)


def stored(value: tensor_pb2.Value) -> list[tensor_pb2.TensorRef]:
    """Those of `references` that somebody keeps: their bytes are not inline."""
    return [ref for ref in references(value) if not ref.HasField("inline")]


def value_of(value: tensor_pb2.Value) -> WireValue:
    """What `encode_value` took; a tensor comes out as its TensorRef. Raises on an empty Value."""
    match value.WhichOneof("kind"):
        case "text":
            return value.text
        case "integer":
            return value.integer
        case "number":
            return value.number
        case "flag":
            return value.flag
        case "blob":
            return value.blob
        case "tensor":
            return value.tensor
        case "list":
            return [value_of(item) for item in value.list.values]
    raise InvalidInput("a value without content; set one of text, integer, number, flag, blob")
