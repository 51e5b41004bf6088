# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from kubediffusion.errors import InvalidInput
from kubediffusion.node import ports
from kubediffusion.v1alpha1 import tensor_pb2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_tensor_comes_out_with_its_values_and_its_memory_format(
    dtype: torch.dtype, channels_last: bool
) -> None:
    value = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(dtype)
    if channels_last:
        value = value.contiguous(memory_format=torch.channels_last)
    out = ports.tensor(ports.inline("t", value), {})
    assert torch.equal(out, value)
    assert out.dtype == dtype
    assert out.stride() == value.stride()


def test_a_view_is_packed() -> None:
    value = torch.arange(24.0).reshape(4, 6)[:, ::2]
    out = ports.tensor(ports.inline("t", value), {})
    assert torch.equal(out, value)
    assert out.is_contiguous()


@pytest.mark.parametrize(("shape", "name"), [([6], "channels_last"), ([1, 1, 2, 3], "blocked")])
def test_a_memory_format_that_cannot_be_is_refused(shape: list[int], name: str) -> None:
    ref = tensor_pb2.TensorRef(
        id="t", shape=shape, dtype=tensor_pb2.DTYPE_U8, nbytes=6, memory_format=name
    )
    with pytest.raises(InvalidInput, match=name):
        ports.check(ref)
