# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a budget saves through the whole service: tiny-sd3, pruned beside dense, in turn.

Speed does not depend on what an artifact has learnt, so this one is untrained, with the same ratio
at every step and in every block. What is counted is CPU time of the denoiser's process, and the
limit beside it is the one that the FLOPs of the forward set.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Row
from benchmarks.exact import TINY

STEPS = 20
SIDES = (128, 256)
BUDGETS = (0.8, 0.6, 0.4)
WORKFLOW = """
apiVersion: kubediffusion.io/v1alpha1
kind: DiffusionWorkflow
metadata: {name: tiny}
spec:
  pipeline: {preset: StableDiffusion3, source: {uri: "builtin://tiny-sd3"}}
  models:
    transformer: {pruning: {artifact: {uri: "file://%s"}}}
"""


def _artifact(folder: Path) -> tuple[Path, dict[tuple[int, float], float]]:
    """An untrained artifact, and dense / pruned FLOPs by (side, budget)."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    from shiva_kernels import Artifact
    from shiva_kernels.flops import cost_model
    from shiva_kernels.tables import build_table

    transformer: Any = SD3Transformer2DModel.from_pretrained(TINY / "pipeline/transformer")
    sigmas = tuple(1 - i / STEPS for i in range(STEPS))
    artifact = Artifact.untrained(transformer, tokens=64, sigmas=sigmas, budgets=BUDGETS)
    limits = {}
    for side in SIDES:
        latent = side // 8
        costs = cost_model(transformer, 2, (latent, latent), 24 + 32)
        for budget in BUDGETS:
            curve = artifact.tables[budget].curve
            table = build_table(curve, budget, sigmas, (latent // 2) ** 2, None)
            limits[side, budget] = costs.dense.true / costs.of_table(table).true
    return artifact.save(folder / "artifact"), limits


async def _measured(folder: Path, rounds: int) -> dict[tuple[int, float], list[float]]:
    """CPU seconds of the denoiser by (side, budget); budget 1 is dense."""
    import psutil

    from kubediffusion.client.core import build_request
    from kubediffusion.local.runtime import LocalRuntime

    file = folder / "tiny.yaml"
    file.write_text(WORKFLOW % (folder / "artifact"))
    spent: dict[tuple[int, float], list[float]] = {}
    async with LocalRuntime([file]) as runtime:
        await runtime.ready()
        reports = runtime.supervisor.reports()
        denoiser = psutil.Process(next(r.pid for r in reports if r.name == "denoiser"))

        async def draw(side: int, budget: float) -> float:
            sizes = {"width": side, "height": side, "max_sequence_length": 32}
            inputs = {"prompt": "a red circle", "seed": 1, "steps": STEPS, **sizes}
            before = denoiser.cpu_times()
            async for _ in runtime.generate(
                build_request("tiny", "", inputs=inputs, budget=budget)
            ):
                pass
            after = denoiser.cpu_times()
            return after.user + after.system - before.user - before.system

        for number in range(-1, rounds):  # the first warms up
            for side in SIDES:
                for budget in (1.0, *BUDGETS)[:: 1 if number % 2 else -1]:
                    seconds = await draw(side, budget)
                    if number >= 0:
                        spent.setdefault((side, budget), []).append(seconds)
    return spent


def run(rounds: int) -> list[Row]:
    """Rows of dense / pruned CPU time (ours) beside dense / pruned FLOPs (peer)."""
    with tempfile.TemporaryDirectory() as name:
        _, limits = _artifact(Path(name))
        spent = asyncio.run(_measured(Path(name), rounds))
    rows = []
    for (side, budget), limit in limits.items():
        size = f"{side} px, {(side // 16) ** 2} tokens"
        dense, pruned = (statistics.median(spent[side, each]) for each in (1.0, budget))
        rows.append(
            Row(
                "pruning-service",
                f"tiny-sd3, {size}, budget {budget:g}, faster than dense",
                dense / pruned,
                limit,
                "x",
                "",
                None,
                rounds,
                f"{100 * (dense / pruned) / limit:.0f} % of the FLOPs limit; "
                f"{pruned:.2f} beside {dense:.2f} CPU s",
            )
        )
    return rows


if __name__ == "__main__":
    for row in run(3):
        print(row.name, f"{row.ours:.3f}", row.note)
