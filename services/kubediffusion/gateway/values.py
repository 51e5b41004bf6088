# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Wire values as a coordinator meets them."""

from __future__ import annotations

from kubediffusion.errors import InvalidInput
from kubediffusion.tensors import WireValue, references, value_of
from kubediffusion.v1alpha1 import tensor_pb2


def client_value(value: tensor_pb2.Value, field: str) -> WireValue:
    """A value that a client sent: clients cannot refer to tensors. Raises naming `field`."""
    if any(True for _ in references(value)) or value.WhichOneof("kind") is None:
        raise InvalidInput(
            "a tensor or an empty value cannot be an input; "
            "give text, an integer, a number, a flag or an image's bytes",
            field=field,
        )
    return value_of(value)
