# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How many pictures through the whole service equal diffusers' in one process, byte for byte."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import Row
from benchmarks.reference import Case, Setup, cases, draw, inputs, workflow
from kubediffusion.local.runtime import LocalRuntime
from kubediffusion.tensors import encode_value
from kubediffusion.v1alpha1 import gateway_pb2

ROOT = Path(__file__).parent.parent
TINY = ROOT / "models/tiny-sd3"


async def through_the_service(
    setups: Mapping[str, Setup], wanted: Mapping[str, Sequence[Case]], folder: Path
) -> dict[tuple[str, str], bytes]:
    """PNGs by (setup, case), all setups served at once by nodes of their own processes."""
    files = []
    for name, setup in setups.items():
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(workflow(setup, name))
    out: dict[tuple[str, str], bytes] = {}
    async with LocalRuntime(files) as runtime:
        await runtime.ready()
        for name in setups:
            for case in wanted[name]:
                request = gateway_pb2.GenerateRequest(
                    workflow=name,
                    inputs={k: encode_value(v) for k, v in inputs(case).items()},
                    loras=case.loras,
                    budget=case.budget,
                )
                async for event in runtime.generate(request):
                    if event.WhichOneof("kind") == "image":
                        out[name, case.name] = event.image.png
    return out


def tiny(dtype: str) -> Setup:
    """The trained pipeline, with its ControlNet twice, as diffusers too can be given it twice."""
    edges = TINY / "controlnets/edges"
    loras = {path.name: path for path in sorted((TINY / "loras").iterdir())}
    return Setup(TINY / "pipeline", {"edges": edges, "again": edges}, loras, dtype)


def small(folder: Path, version: str, t5: bool, dtype: str) -> Setup:
    """A small random pipeline; the tests make the same ones."""
    sys.path.insert(0, str(ROOT / "tests/parity"))
    from small_pipelines import make_sd3

    path = folder / f"sd{version}-{t5}-{dtype}"
    make_sd3(path, version=version, t5=t5, controlnets=2, loras=2)
    nets = {"first": path / "controlnet_0", "second": path / "controlnet_1"}
    return Setup(path, nets, {"one": path / "lora_0", "two": path / "lora_1"}, dtype)


def run(rounds: int) -> list[Row]:
    del rounds  # equal bytes need no repetition
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setups = {"tiny-f32": tiny("float32"), "tiny-bf16": tiny("bfloat16")}
        for version in ("3", "3.5"):
            for t5 in (True, False):
                for dtype in ("float32", "bfloat16"):
                    key = f"sd{version}{'' if t5 else '-no-t5'}-{dtype}".replace(".", "")
                    setups[key] = small(folder, version, t5, dtype)
        wanted = {key: cases(setup) for key, setup in setups.items()}
        ours = asyncio.run(through_the_service(setups, wanted, folder))
        rows = []
        for key, setup in setups.items():
            equal = sum(ours[key, case.name] == draw(setup, case) for case in wanted[key])
            n = len(wanted[key])
            rows.append(
                Row("exact", key, equal, n, "pictures", "all equal diffusers'", equal == n, 1)
            )
        return rows
