# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What an exception out of a model means."""

from __future__ import annotations

from typing import TypeAlias

import torch

from kubediffusion.errors import HelperLost, Internal, InvalidInput, KubeDiffusionError, Overloaded
from kubediffusion.v1alpha1 import node_pb2

FailureReason: TypeAlias = node_pb2.FailureReason


def failure_of(error: Exception) -> tuple[KubeDiffusionError, FailureReason]:
    """What a task's failure is called on the wire."""
    if is_out_of_memory(error):
        text = f"the device has no memory for it ({str(error).splitlines()[0]})"
        return Overloaded(text, retry_after=1.0), node_pb2.FAILURE_REASON_OUT_OF_MEMORY
    if isinstance(error, Overloaded):
        return error, node_pb2.FAILURE_REASON_OUT_OF_MEMORY
    if isinstance(error, InvalidInput):
        return error, node_pb2.FAILURE_REASON_INVALID_INPUT
    if isinstance(error, HelperLost):
        return error, node_pb2.FAILURE_REASON_HELPER_LOST
    if isinstance(error, KubeDiffusionError):
        return error, node_pb2.FAILURE_REASON_INTERNAL
    text = f"unexpected {type(error).__name__}; see the node's log"
    return Internal(text), node_pb2.FAILURE_REASON_INTERNAL


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def is_poisoned(error: BaseException) -> bool:
    """A device error after which every further call fails: only a new process helps."""
    if is_out_of_memory(error):
        return False
    fatal: type[BaseException] | None = getattr(torch, "AcceleratorError", None)
    if fatal is not None and isinstance(error, fatal):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)
