# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The operations where no kernel runs: in compiled graphs, on fake tensors, without Triton, and
the kernels compiled ahead of time for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch
from interpreted import run_python
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernels import compiled
from shiva_kernels.ops import gather_tokens, scatter_tokens, soft_rank


def _all_three(x: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    index = scores.topk(k, dim=1).indices.sort(dim=1).values
    out = scatter_tokens(x, index, torch.tanh(gather_tokens(x, index)))
    return out, soft_rank(scores, 0.2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_compiled_graph_gives_the_eager_values_and_gradients(backend):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 6, generator=generator).requires_grad_()
    scores = torch.randn(2, 12, generator=generator).requires_grad_()
    graph = torch.compile(_all_three, fullgraph=True, backend=backend)
    results = []
    for call in (_all_three, graph):
        out, ranks = call(x, scores, 5)
        loss = out.square().sum() + (ranks * torch.arange(12)).sum()
        results.append((out, ranks, *torch.autograd.grad(loss, (x, scores))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    with FakeTensorMode():
        x = torch.empty(2, 12, 6, dtype=torch.bfloat16, requires_grad=True)
        scores = torch.empty(2, 12, requires_grad=True)
        out, ranks = _all_three(x, scores, 5)
        grads = torch.autograd.grad(out.float().sum() + ranks.sum(), (x, scores))
    found = [(t.shape, t.dtype) for t in (out, ranks, *grads)]
    features, row = (torch.Size([2, 12, 6]), torch.bfloat16), (torch.Size([2, 12]), torch.float32)
    assert found == [features, row, features, row]


def test_fake_tensors_of_a_gpu_stay_there():
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 12, 6, device="cuda", dtype=torch.float16)
        scores = torch.empty(2, 12, device="cuda")
        out, ranks = _all_three(x, scores, 5)
    assert (out.device.type, out.shape, out.dtype) == ("cuda", x.shape, x.dtype)
    assert (ranks.device.type, ranks.shape, ranks.dtype) == ("cuda", scores.shape, scores.dtype)


def test_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from shiva_kernels.ops import gather_tokens, scatter_tokens, soft_rank
from shiva_kernels.ops._triton import HAS_TRITON
x, index = torch.arange(6.0).view(1, 3, 2), torch.tensor([[2, 0]])
assert not HAS_TRITON
out = scatter_tokens(x, index, -gather_tokens(x, index))
assert out.flatten().tolist() == [0, -1, 2, 3, -4, -5]
assert soft_rank(torch.tensor([[0.0, 9.0]]), 0.1).round().tolist() == [[2, 1]]
"""
    run_python("-c", code)


def test_committed_table_is_what_the_compiler_gives():
    """One dtype of it: all three are compiled by `python -m benchmarks.kernels.compiled`."""
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.9."):
        pytest.skip(f"the table is of Triton 3.9, and this is {triton.__version__}")
    committed = [row for row in compiled.read() if row.dtype == "bf16"]
    fresh = [
        compiled.compile_for(target, "bf16", arch)
        for target in compiled.targets("bf16")
        for arch in compiled.ARCHITECTURES
    ]
    assert fresh == committed


def test_no_kernel_spills_and_half_of_the_warps_fit():
    for row in compiled.read():
        assert (row.spill_stores, row.spill_loads) == (0, 0), row
        assert row.warps_by_registers >= 32, row


def test_rows_are_moved_sixteen_bytes_at_a_time():
    moves = [row for row in compiled.read() if row.kernel in ("gather_kernel", "scatter_kernel")]
    assert len(moves) == 2 * len(compiled.DTYPES) * len(compiled.ARCHITECTURES)
    for row in moves:
        width = 4 if row.dtype == "fp32" else 2
        expected = 4096 * width // (16 * 32 * row.warps)
        assert (row.vector_loads, row.vector_stores) == (expected, expected), row
