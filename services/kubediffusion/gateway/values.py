# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Wire values as a coordinator meets them."""

from __future__ import annotations

from collections.abc import Iterator

from kubediffusion.errors import InvalidInput
from kubediffusion.tensors import WireValue, value_of
from kubediffusion.v1alpha1 import tensor_pb2


def client_value(value: tensor_pb2.Value, field: str) -> WireValue:
    """A value that a client sent: clients cannot refer to tensors. Raises naming `field`."""
    if any(True for _ in _all_tensors(value)) or value.WhichOneof("kind") is None:
        raise InvalidInput(
            "a tensor or an empty value cannot be an input; "
            "give text, an integer, a number, a flag or an image's bytes",
            field=field,
        )
    return value_of(value)


def tensors_of(value: tensor_pb2.Value) -> Iterator[tensor_pb2.TensorRef]:
    """The references in a value, those with inline bytes left out: nobody has to keep them."""
    return (ref for ref in _all_tensors(value) if not ref.HasField("inline"))


def _all_tensors(value: tensor_pb2.Value) -> Iterator[tensor_pb2.TensorRef]:
    kind = value.WhichOneof("kind")
    if kind == "tensor":
        yield value.tensor
    elif kind == "list":
        for item in value.list.values:
            yield from _all_tensors(item)
