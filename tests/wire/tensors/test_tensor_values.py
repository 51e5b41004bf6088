# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubediffusion.errors import InvalidInput
from kubediffusion.tensors import (
    as_array,
    dtype_name,
    dtype_of,
    encode_value,
    nbytes_of,
    numpy_dtype,
    value_of,
)
from kubediffusion.v1alpha1 import tensor_pb2

scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=12)
dtypes = [number for number in tensor_pb2.DType.values() if number != 0]


@given(values)
def test_a_value_comes_back_as_it_went_and_of_the_same_type(value: object) -> None:
    wire = tensor_pb2.Value.FromString(encode_value(value).SerializeToString())
    back = value_of(wire)
    assert back == value
    assert type(back) is type(value)


def test_numpys_scalars_and_tuples_are_plain_values() -> None:
    assert value_of(encode_value(np.float32(0.5))) == 0.5
    assert value_of(encode_value(np.bool_(True))) is True
    assert value_of(encode_value((1, np.int64(2)))) == [1, 2]


def test_a_tensor_stays_a_reference() -> None:
    ref = tensor_pb2.TensorRef(id="x", shape=[1], dtype=tensor_pb2.DTYPE_U8, nbytes=1)
    assert value_of(encode_value([ref])) == [ref]


@pytest.mark.parametrize("value", [None, object(), {1: 2}, np.zeros(3), 2**63, -(2**63) - 1])
def test_what_has_no_place_on_the_wire_is_refused(value: object) -> None:
    with pytest.raises(InvalidInput):
        encode_value(value)


def test_a_value_without_content_is_refused() -> None:
    with pytest.raises(InvalidInput, match="without content"):
        value_of(tensor_pb2.Value())


@pytest.mark.parametrize("dtype", dtypes)
def test_every_type_of_the_wire_has_a_name_and_a_size(dtype: int) -> None:
    name = dtype_name(dtype)
    assert dtype_of(name) == dtype_of(f"torch.{name}") == dtype
    assert nbytes_of((2, 3), dtype) == 6 * numpy_dtype(dtype).itemsize


def test_a_type_that_nobody_knows_is_refused() -> None:
    for call in (lambda: dtype_of("complex64"), lambda: numpy_dtype(0), lambda: dtype_name(99)):
        with pytest.raises(InvalidInput):
            call()


def test_bytes_become_an_array_without_a_copy() -> None:
    data = np.arange(24, dtype=np.uint8)
    ref = tensor_pb2.TensorRef(shape=[2, 3], dtype=tensor_pb2.DTYPE_F32, nbytes=24)
    array = as_array(data, ref)
    assert (array.shape, array.dtype) == ((2, 3), np.float32)
    assert np.shares_memory(array, data)
