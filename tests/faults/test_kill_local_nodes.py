# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""kill -9 of model nodes while they generate: every picture comes, and is the undisturbed one."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kubediffusion import rpc
from kubediffusion.client.core import build_request
from kubediffusion.client.events import Image, Resumed, Stepped, event_of
from kubediffusion.gateway.config import GatewayConfig
from kubediffusion.local.restart import RestartPolicy
from kubediffusion.local.runtime import LocalRuntime
from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc

GENERATIONS = 50
CONCURRENT = 2
STEPS = 12
CHECKPOINT_EVERY = 3
PROMPTS = ("a red circle", "blue square above a green circle", "a circle left of a square")
# Fifty restarts on a machine that does much else.
WAIT = 800.0

WORKFLOW = """
apiVersion: kubediffusion.io/v1alpha1
kind: DiffusionWorkflow
metadata: {name: small}
spec:
  pipeline:
    preset: StableDiffusion3
    source: {uri: "file://pipeline"}
"""


@dataclass
class Seen:
    """What one generation showed its client."""

    png: bytes = b""
    resumed: int = 0
    repeated: list[int] = field(default_factory=list[int])


@pytest.fixture(scope="module")
def workflow_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
    from small_pipelines import make_sd3

    folder = tmp_path_factory.mktemp("small")
    make_sd3(folder / "pipeline", t5=False)
    file = folder / "small.yaml"
    file.write_text(WORKFLOW)
    return file


@pytest.fixture
async def runtime(
    workflow_file: Path, fork_server: None, run_base: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[LocalRuntime]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run_base))
    runtime = LocalRuntime(
        [workflow_file],
        replicas={"transformer": 2},
        gateway=GatewayConfig(checkpoint_every=CHECKPOINT_EVERY),
        # Nodes that are killed all the time are no crash loop.
        policy=RestartPolicy(healthy=0.0),
    )
    async with runtime:
        await runtime.ready()
        yield runtime
    assert [name for _, names, files in os.walk(run_base) for name in (*names, *files)] == [
        f"kubediffusion-{os.getuid()}"
    ]
    assert not runtime.folder.shm.exists()


async def generate(runtime: LocalRuntime, number: int, kill_after: int | None = None) -> Seen:
    """One generation; after `kill_after` events a node is killed, any of them."""
    seen, events, last_step = Seen(), 0, 0
    request = build_request(
        "small",
        "",
        prompt=PROMPTS[number % len(PROMPTS)],
        seed=number % len(PROMPTS),
        steps=STEPS,
        guidance=4.0,
    )
    async for message in runtime.generate(request):
        if events == kill_after:
            kill(runtime, random.Random(number))
        events += 1
        match event_of(message):
            case Stepped(step=step):
                last_step = step
            case Resumed(stage="denoise", from_step=step):
                seen.resumed += 1
                seen.repeated.append(last_step - step)
                last_step = step
            case Image(png=png):
                seen.png = png
            case _:
                pass
    return seen


def kill(runtime: LocalRuntime, luck: random.Random) -> None:
    alive = [report.pid for report in runtime.supervisor.reports() if report.pid]
    if alive:
        os.kill(luck.choice(alive), signal.SIGKILL)


@pytest.mark.timeout(WAIT + 100)
async def test_killing_any_node_at_any_time_costs_no_request_and_changes_no_picture(
    runtime: LocalRuntime,
) -> None:
    undisturbed = [(await generate(runtime, number)).png for number in range(len(PROMPTS))]
    assert len(set(undisturbed)) == len(PROMPTS)

    luck = random.Random(7)
    numbers = iter(range(GENERATIONS))
    results: dict[int, Seen] = {}

    async def client() -> None:
        for number in numbers:
            # A generation has an event a step, and about five more.
            results[number] = await generate(runtime, number, luck.randrange(STEPS + 5))

    async with asyncio.timeout(WAIT), asyncio.TaskGroup() as clients:
        for _ in range(CONCURRENT):
            clients.create_task(client())

    assert sorted(results) == list(range(GENERATIONS))
    wrong = [n for n, seen in results.items() if seen.png != undisturbed[n % len(PROMPTS)]]
    assert wrong == []
    repeated = [steps for seen in results.values() for steps in seen.repeated]
    assert len(repeated) > 5, "the denoiser was hardly hit: this run tested nothing"
    assert max(repeated) <= CHECKPOINT_EVERY
    restarts = sum(report.restarts for report in runtime.supervisor.reports())
    assert restarts > GENERATIONS // 2
    await nothing_is_held(runtime)


async def nothing_is_held(runtime: LocalRuntime) -> None:
    """No task in the gateway, no tensor on a node, once the releases have arrived."""
    await runtime.ready()
    assert not {k: v for k, v in runtime.gateway.debug_counts().items() if v and k != "releases"}
    for address in runtime.supervisor.addresses:
        async with asyncio.timeout(WAIT):
            while (await load(address)).tensors:  # noqa: ASYNC110 - another process' state
                await asyncio.sleep(0.02)


async def load(address: str) -> node_pb2.LoadReport:
    channel = rpc.connect(address)
    try:
        stub: Any = node_pb2_grpc.ModelNodeStub(channel)
        request = node_pb2.DescribeRequest()
        return (await stub.Describe(request, wait_for_ready=True, timeout=30)).load
    finally:
        await channel.close()
