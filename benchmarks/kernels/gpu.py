# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Every kernel on a GPU, beside PyTorch's eager mode and inductor: `make bench-gpu`.

python -m benchmarks.kernels.gpu [--dtype bf16] [--out benchmarks/results/kernels_gpu.csv]

Correctness first: a kernel whose values or gradients differ from plain PyTorch ends the run. Then
`triton.testing.do_bench` of each op's forward and backward, at the shapes of SD3 at 512 and 1024 px
(both branches of guidance) and of Flux, keep ratio 0.6. What moves bytes is also given as a share
of a plain device-to-device copy of the same bytes, measured in the same run.

No result is committed: no machine that had a GPU has run this yet.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.common import RESULTS
from benchmarks.kernels import gather, scatter, soft_rank

OUT = RESULTS / "kernels_gpu.csv"
KEEP = 0.6
# Batch, image tokens, width.
SHAPES = {
    "SD3 512 px": (2, 1024, 1536),
    "SD3 1024 px": (2, 4096, 1536),
    "Flux 1024 px": (1, 4096, 3072),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Contest:
    """One op and its peer on the same arguments; `moved` are the bytes that it must read and write.

    Only floating-point arguments that require a gradient get one. `tolerance` is relative to the
    largest element.
    """

    name: str
    ours: Callable[..., Tensor]
    peer: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    moved: int | None
    tolerance: float


def contests(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Contest]]:
    """All ops at all shapes."""
    for shape, (batch, tokens, width) in SHAPES.items():
        generator = torch.Generator(device).manual_seed(0)
        scores = torch.randn(batch, tokens, generator=generator, device=device)
        k = int(KEEP * tokens)
        x = torch.randn(batch, tokens, width, generator=generator, device=device, dtype=dtype)
        y = torch.randn(batch, k, width, generator=generator, device=device, dtype=dtype)
        index = scores.topk(k, dim=1).indices.sort(dim=1).values
        row = width * dtype.itemsize
        kept, all_rows = batch * k * row, batch * tokens * row
        for tensor in (scores, x, y):
            tensor.requires_grad_()
        ours, peer = soft_rank.soft_rank, soft_rank.naive_soft_rank
        tau = soft_rank.TAU
        yield shape, Contest("soft_rank", ours, peer, (scores, tau), None, 1e-4)
        ours, peer = gather.gather_tokens, gather.peer
        yield shape, Contest("gather_tokens", ours, peer, (x, index), 2 * kept, 0)
        ours, peer = scatter.scatter_tokens, scatter.peer
        moved = 2 * all_rows + 2 * kept
        yield shape, Contest("scatter_tokens", ours, peer, (x, index, y), moved, 0)


def leaves(contest: Contest) -> list[Tensor]:
    return [a for a in contest.arguments if isinstance(a, Tensor) and a.requires_grad]


def check(contest: Contest) -> None:
    """Raises AssertionError where values or gradients differ by more than the tolerance."""
    results = []
    for call in (contest.ours, contest.peer):
        out = call(*contest.arguments)
        grad = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
        results.append((out.detach(), *torch.autograd.grad(out, leaves(contest), grad)))
    for ours, theirs in zip(*results, strict=True):
        scale = float(theirs.abs().max())
        worst = float((ours - theirs).abs().max())
        assert worst <= contest.tolerance * scale, f"{contest.name}: off by {worst} of {scale}"


def milliseconds(call: Callable[..., Tensor], contest: Contest) -> dict[str, float]:
    """Medians of the forward alone, and of the backward alone."""
    import triton

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*contest.arguments)

    out = call(*contest.arguments)
    grad = torch.ones_like(out)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves(contest), grad, retain_graph=True)

    do_bench: Any = triton.testing.do_bench
    return {
        "forward": do_bench(forward, return_mode="median"),
        "backward": do_bench(backward, return_mode="median"),
    }


def copy_milliseconds(moved: int, device: torch.device) -> float:
    """A plain copy that reads and writes `moved` bytes in all."""
    import triton

    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    do_bench: Any = triton.testing.do_bench
    return do_bench(lambda: target.copy_(source), return_mode="median")


def measure(contest: Contest, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of the result: a pass (forward, backward) each."""
    torch.compiler.reset()  # a graph for this shape, not one for all
    compiled = torch.compile(contest.peer, fullgraph=True, dynamic=False)
    times = {
        "ours": milliseconds(contest.ours, contest),
        "eager": milliseconds(contest.peer, contest),
        "inductor": milliseconds(compiled, contest),
    }
    for direction in ("forward", "backward"):
        row = {f"{who}_ms": f"{found[direction]:.4f}" for who, found in times.items()}
        best = min(times[peer][direction] for peer in ("eager", "inductor"))
        row |= {"pass": direction, "to_best_peer": f"{times['ours'][direction] / best:.3f}"}
        if contest.moved is not None and direction == "forward":
            share = copy_milliseconds(contest.moved, device) / times["ours"][direction]
            row["of_copy"] = f"{share:.3f}"
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "make bench-gpu: PyTorch sees no CUDA device here. Run it on a machine with an NVIDIA "
            "GPU and its driver; without one, `python -m benchmarks.kernels.compiled` compiles the "
            "kernels and `pytest tests/kernels` runs them in Triton's interpreter."
        )
    device = torch.device("cuda")
    # The backward is timed many times over one forward, so its buffers are not to be given away.
    functorch_config.donated_buffer = False
    names = ["gpu", "torch", "triton", "dtype", "shape", "op", "pass", "ours_ms", "eager_ms"]
    names += ["inductor_ms", "to_best_peer", "of_copy"]
    import triton

    head = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": arguments.dtype,
    }
    with arguments.out.open("w", newline="") as f:
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        for shape, contest in contests(DTYPES[arguments.dtype], device):
            check(contest)
            for row in measure(contest, device):
                row = {**head, "shape": shape, "op": contest.name, **row}
                writer.writerow(row)
                f.flush()
                print(*(row.get(name, "") for name in names[4:]), sep="\t", flush=True)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
