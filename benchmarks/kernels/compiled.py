# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel ahead of time for GPUs that are not here; registers, spills, vector loads.

python -m benchmarks.kernels.compiled [--out benchmarks/results/kernels_compiled.csv]

Triton needs no GPU to compile: pointers and sizes are specialised as they are in a run of SD3 at
1024 px (4,096 tokens of width 1,536: pointers and sizes divisible by 16). The figures are what
Triton's own ptxas says of the PTX. They bound what a kernel can do on a GPU and say nothing of
how fast it is.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

ARCHITECTURES = (80, 90, 100)
DTYPES = ("fp32", "fp16", "bf16")
OUT = RESULTS / "kernels_compiled.csv"
# A multiprocessor's register file, and the most warps that it holds, of all three architectures.
_REGISTERS, _WARPS = 65536, 64


@dataclass(frozen=True)
class Target:
    """A kernel and the Triton types of its arguments; `constants` are known at compile time."""

    module: str
    kernel: str
    arguments: dict[str, str]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """A kernel as ptxas made it. Bytes of spills are a thread's; shared memory is a program's."""

    kernel: str
    dtype: str
    arch: str
    warps: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    vector_loads: int  # 16-byte loads from global memory in the PTX
    vector_stores: int
    warps_by_registers: int  # resident warps of 64 that the register file has room for


def targets(dtype: str) -> Iterator[Target]:
    """Each kernel of `shiva_kernels.ops` for features, or scores, of `dtype`."""
    ranks = {"N": "i32", "tau": "fp32"}
    yield Target(
        "soft_rank", "soft_rank_kernel", {"scores": f"*{dtype}", "ranks": "*fp32"} | ranks, {}
    )
    yield Target(
        "soft_rank",
        "soft_rank_backward_kernel",
        {"grad": "*fp32", "scores": f"*{dtype}", "out": f"*{dtype}"} | ranks,
        {},
    )
    sizes = {"K": "i32", "D": "i32", "stride_b": "i32"}
    x, index = f"*{dtype}", "*i64"
    yield Target(
        "gather",
        "gather_kernel",
        {"x": x, "index": index, "out": x} | sizes | {"stride_n": "i32"},
        {},
    )
    for has_y in (True, False):
        yield Target(
            "scatter",
            "scatter_kernel",
            {"out": x, "index": index, "y": x, "N": "i32"} | sizes | {"stride_k": "i32"},
            {"HAS_Y": has_y},
        )


def compile_for(target: Target, dtype: str, arch: int) -> Compiled:
    """Compile for compute capability `arch` (90 is sm_90) and read what came out."""
    import triton
    from triton.backends.compiler import GPUTarget

    module: Any = importlib.import_module(f"shiva_kernels.ops.{target.module}")
    kernel = getattr(module, target.kernel)
    constants = target.constants | module.LAUNCH.blocks
    arguments = target.arguments | dict.fromkeys(constants, "constexpr")
    signature = {name: arguments[name] for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*") or kind == "i32"
    }
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    options = {"num_warps": module.LAUNCH.num_warps, "enable_fp_fusion": True}
    binary: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    said = _ptxas(binary.asm["ptx"], arch)
    registers = int(_number(r"Used (\d+) registers", said))
    suffix = {True: "", False: " (zeros)"}[target.constants.get("HAS_Y", True)]
    return Compiled(
        kernel=target.kernel + suffix,
        dtype=dtype,
        arch=f"sm_{arch}",
        warps=module.LAUNCH.num_warps,
        registers=registers,
        spill_stores=_number(r"(\d+) bytes spill stores", said),
        spill_loads=_number(r"(\d+) bytes spill loads", said),
        shared=binary.metadata.shared,
        vector_loads=len(re.findall(r"ld\.global\S*\.v4\.b32", binary.asm["ptx"])),
        vector_stores=len(re.findall(r"st\.global\S*\.v4\.b32", binary.asm["ptx"])),
        # Registers are handed out to a warp 256 at a time.
        warps_by_registers=min(_WARPS, _REGISTERS // (-(-registers * 32 // 256) * 256)),
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"ptxas did not say {pattern!r}, but: {text}")
    return int(match[1])


def _ptxas(ptx: str, arch: int) -> str:
    """What Triton's ptxas says when asked to be verbose; the PTX names its own target."""
    from triton.backends.nvidia.compiler import get_ptxas

    match = re.search(r"\.target (\w+)", ptx)
    assert match is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", "--gpu-name", match[1], path, "-o", f"{path}.cubin"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def table() -> list[Compiled]:
    """All kernels, dtypes and architectures."""
    return [
        compile_for(target, dtype, arch)
        for dtype in DTYPES
        for target in targets(dtype)
        for arch in ARCHITECTURES
    ]


def write(rows: list[Compiled], path: Path) -> None:
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, [field.name for field in fields(Compiled)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(path: Path = OUT) -> list[Compiled]:
    """The committed table."""
    with path.open(newline="") as f:
        return [
            Compiled(**{k: int(v) if v.isdigit() else v for k, v in row.items()})  # type: ignore[arg-type]
            for row in csv.DictReader(f)
        ]


def markdown(rows: list[Compiled]) -> str:
    """The table of docs/kernels.md: a line for a kernel and dtype, architectures side by side."""
    lines = [
        "| kernel | dtype | registers sm_80 / 90 / 100 | spilled bytes | 16-byte loads, stores | "
        "warps of 64 that fit |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.dtype), []).append(row)
    for (kernel, dtype), group in groups.items():
        spilled = " / ".join(str(row.spill_stores + row.spill_loads) for row in group)
        registers = " / ".join(str(row.registers) for row in group)
        warps = " / ".join(str(row.warps_by_registers) for row in group)
        moves = f"{group[0].vector_loads}, {group[0].vector_stores}"
        lines.append(f"| `{kernel}` | {dtype} | {registers} | {spilled} | {moves} | {warps} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=OUT)
    path = parser.parse_args().out
    rows = table()
    write(rows, path)
    print(markdown(rows))
    print(f"\n{len(rows)} binaries; written to {path}")


if __name__ == "__main__":
    main()
