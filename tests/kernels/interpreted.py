# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel under Triton's interpreter, on CPU tensors, beside plain PyTorch.

Run as a script in a process of its own: TRITON_INTERPRET is read when Triton is imported, and the
interpreter then stands for every kernel of the process. Prints one JSON object, case -> error, in
units that each operation's function states. Imported, it runs that process once.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import torch
from torch import Tensor

OPS = ("soft_rank", "soft_rank_backward", "gather", "scatter")
DTYPES = {"float32": torch.float32, "float16": torch.float16}
# Scores (B, N): one token; fewer than a tile; a tile and one; several odd tiles.
SCORES = [(1, 1), (2, 3), (1, 129), (3, 203)]
# Tokens (B, N, D, k): all, one, odd everything, more than a tile of rows and of columns.
TOKENS = [(1, 1, 1, 1), (2, 5, 3, 5), (2, 19, 37, 7), (1, 23, 515, 17), (3, 4, 16, 0)]


@functools.cache
def errors() -> dict[str, float]:
    """The error of each case, by name; runs the interpreter once for a process of tests."""
    import pytest

    pytest.importorskip("triton", reason="there are no kernels without Triton")
    return json.loads(run_python(__file__, TRITON_INTERPRET="1", PYTHONWARNINGS="ignore"))


def run_python(*arguments: str, **environment: str) -> str:
    """What another Python, which can import what this one can, prints; it has to succeed."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def cases(op: str) -> list[str]:
    """The names of the cases of one operation, for parametrisation: no process is started."""
    shapes = SCORES if op.startswith("soft_rank") else TOKENS
    return [f"{op} {shape} {dtype}" for shape in shapes for dtype in DTYPES]


def _seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _scores(batch: int, tokens: int) -> Tensor:
    scores = _seeded(batch, tokens)
    # Two equal scores, and two so far apart that the sigmoid saturates.
    scores[0, -1] = scores[0, 0]
    scores[-1, 0] = 40
    return scores


def soft_rank_error(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """In ranks; the reference is Eq. 5 in float64."""
    from shiva_kernels.ops.soft_rank import forward_triton

    scores = _scores(*shape).to(dtype)
    s = scores.double()
    reference = 0.5 + torch.sigmoid((s[:, None, :] - s[:, :, None]) / 0.2).sum(2)
    return float((forward_triton(scores, 0.2) - reference).abs().max())


def soft_rank_backward_error(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Relative to the largest gradient; the reference is the closed form in float64."""
    from shiva_kernels.ops.soft_rank import backward_triton

    scores, grad = _scores(*shape).to(dtype), _seeded(*shape)
    s, h = scores.double(), grad.double()
    p = torch.sigmoid((s[:, None, :] - s[:, :, None]) / 0.2)
    reference = (p * (1 - p) * (h[:, None, :] - h[:, :, None])).sum(2) / 0.2
    found = backward_triton(grad, scores, 0.2)
    assert found.dtype == dtype
    return float((found.double() - reference).abs().max() / reference.abs().max().clamp_min(1e-3))


def _tokens(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, index and y; x and y are windows into longer sequences, their rows apart in memory."""
    batch, tokens, width, k = shape
    x = _seeded(batch, tokens + 2, width + 3).to(dtype)[:, 1:-1, :width]
    y = _seeded(batch, k + 1, width + 1).to(dtype)[:, 1:, :width]
    generator = torch.Generator().manual_seed(tokens)
    index = torch.stack([torch.randperm(tokens, generator=generator)[:k] for _ in range(batch)])
    return x, index, y


def gather_error(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """1 where any element differs from `torch.gather`."""
    from shiva_kernels.ops.gather import gather_triton

    x, index, _ = _tokens(shape, dtype)
    expected = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    return float(not torch.equal(gather_triton(x, index), expected))


def scatter_error(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """1 where any element differs from `torch.scatter`, with rows or with zeros."""
    from shiva_kernels.ops.scatter import write_rows_triton

    x, index, y = _tokens(shape, dtype)
    wide = index[..., None].expand(-1, -1, x.shape[2])
    with_rows = write_rows_triton(x.clone(memory_format=torch.contiguous_format), index, y)
    with_zeros = write_rows_triton(x.clone(memory_format=torch.contiguous_format), index, None)
    same = torch.equal(with_rows, x.scatter(1, wide, y))
    return float(not (same and torch.equal(with_zeros, x.scatter(1, wide, 0))))


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for op in OPS:
        error = globals()[f"{op}_error"]
        for shape in SCORES if op.startswith("soft_rank") else TOKENS:
            for name, dtype in DTYPES.items():
                found[f"{op} {shape} {name}"] = error(shape, dtype)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
