# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""kill -9 of the node that denoises a pruned request: another goes on at the same budget."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from random_artifacts import make_artifact
from small_pipelines import make_sd3

from kubediffusion.client.core import build_request
from kubediffusion.client.events import Image, Resumed, Stepped, event_of
from kubediffusion.gateway.config import GatewayConfig
from kubediffusion.local.restart import RestartPolicy
from kubediffusion.local.runtime import LocalRuntime

BUDGETS = (0.8, 0.4)
# A step takes some milliseconds, and its progress is told ten times a second.
STEPS = 120
WORKFLOW = """
apiVersion: kubediffusion.io/v1alpha1
kind: DiffusionWorkflow
metadata: {name: small}
spec:
  pipeline:
    preset: StableDiffusion3
    source: {uri: "file://pipeline"}
  models:
    transformer: {pruning: {artifact: {uri: "file://artifact"}, budget: "0.6"}}
"""


@pytest.fixture
async def runtime(
    tmp_path: Path, fork_server: None, run_base: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[LocalRuntime]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run_base))
    make_sd3(tmp_path / "pipeline", t5=False)
    make_artifact(tmp_path / "pipeline", tmp_path / "artifact")
    file = tmp_path / "small.yaml"
    file.write_text(WORKFLOW)
    runtime = LocalRuntime(
        [file],
        replicas={"transformer": 2},
        gateway=GatewayConfig(checkpoint_every=3),
        policy=RestartPolicy(healthy=0.0),
    )
    async with runtime:
        await runtime.ready()
        yield runtime


async def generate(runtime: LocalRuntime, budget: float, kill_at: int = 0) -> tuple[bytes, int]:
    """The picture, and the step from which it was taken up; at `kill_at` both denoisers die."""
    png, resumed_from = b"", 0
    request = build_request("small", "", prompt="a red circle", seed=3, steps=STEPS, budget=budget)
    async for message in runtime.generate(request):
        match event_of(message):
            case Stepped(step=step) if kill_at and step >= kill_at:
                kill_at = 0
                for report in runtime.supervisor.reports():
                    if report.name.startswith("denoiser") and report.pid:
                        os.kill(report.pid, signal.SIGKILL)
            case Resumed(stage="denoise", from_step=step):
                resumed_from = max(resumed_from, step)
            case Image() as image:
                png = image.png
            case _:
                pass
    return png, resumed_from


async def test_a_pruned_request_goes_on_elsewhere_with_the_same_bytes(
    runtime: LocalRuntime,
) -> None:
    alone = {budget: (await generate(runtime, budget))[0] for budget in BUDGETS}
    assert len(set(alone.values())) == len(BUDGETS)
    for budget in BUDGETS:
        png, resumed_from = await generate(runtime, budget, kill_at=5)
        assert resumed_from >= 3, "it began anew: this run tested no checkpoint"
        assert png == alone[budget]
        await runtime.ready()
