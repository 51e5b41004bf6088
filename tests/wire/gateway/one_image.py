# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One image over fake nodes: its plan, who listens to it, and the fleet that it runs on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import asynccontextmanager

from fake_nodes import FakeNode, denoise_chain, digest

from kubediffusion.errors import KubeDiffusionError
from kubediffusion.gateway.config import GatewayConfig, RetryLimits
from kubediffusion.gateway.coordinator import ImageRun
from kubediffusion.gateway.nodes import Fleet
from kubediffusion.gateway.plan import ImagePlan, PlannedTask
from kubediffusion.scheduling.profiles import Profiles
from kubediffusion.v1alpha1 import node_pb2, tensor_pb2

STEPS = 12
EVERY = 4
CONFIG = GatewayConfig(
    checkpoint_every=EVERY, retries=RetryLimits(backoff_first=0.001, backoff_most=0.01)
)


def planned(name, model, stage, *, constants=(), ports=(), outputs=(), **more) -> PlannedTask:
    template = node_pb2.Assign(
        key=node_pb2.TaskKey(request_id="r1", task=name),
        model=model,
        stage=stage,
        inputs=dict(constants),
        outputs=outputs,
    )
    return PlannedTask(name, model, stage, template, dict(ports), **more)


def plan(*, activation_timeout: float = 20.0, previews: int = 0) -> ImagePlan:
    text = {"text": tensor_pb2.Value(text="a fox")}
    steps = {"steps": tensor_pb2.Value(integer=STEPS)}
    return ImagePlan(
        request_id="r1",
        index=0,
        seed=7,
        tasks=[
            planned("prompt", "text", "encode", constants=text, outputs=["embeds"]),
            planned(
                "denoise",
                "dit",
                "denoise",
                constants=steps,
                ports={"prompt.embeds": ("prompt", "embeds")},
                outputs=["latents"],
                steps=STEPS,
            ),
            planned(
                "decode",
                "vae",
                "decode",
                ports={"latents": ("denoise", "latents")},
                outputs=["image"],
            ),
        ],
        result=("decode", "image"),
        activation_timeout=activation_timeout,
        previews=previews,
    )


def expected_image() -> bytes:
    embeds = digest(b"text", tensor_pb2.Value(text="a fox").SerializeToString())
    steps = tensor_pb2.Value(integer=STEPS).SerializeToString()
    latents = denoise_chain(digest(b"prompt.embeds", embeds, b"steps", steps), STEPS)
    return (digest(digest(b"latents", latents)) * 6)[: 8 * 8 * 3]


class Outcome:
    """A RunListener that waits for the end."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.end: asyncio.Future = asyncio.get_running_loop().create_future()
        self.held_event = asyncio.Event()
        self.has_begun = False

    def started(self, run, stage, node):
        self.events.append(("started", stage, node))

    def stepped(self, run, step, total_steps):
        self.events.append(("stepped", step))

    def previewed(self, run, step, image):
        self.events.append(("preview", step))

    def checkpointed(self, run, task, checkpoint):
        pass

    def resumed(self, run, task, reason):
        step = task.checkpoint.step if task.checkpoint is not None else 0
        self.events.append(("resumed", task.planned.stage, step, reason))

    def held(self, run, models):
        self.events.append(("held", *models))
        self.held_event.set()

    def completed(self, run, image):
        run.close()
        self.end.set_result(image.tensor)

    def failed(self, run, error):
        self.end.set_result(error)

    async def result(self, seconds: float = 20.0):
        return await asyncio.wait_for(asyncio.shield(self.end), seconds)

    def of(self, kind: str) -> list[tuple]:
        return [event for event in self.events if event[0] == kind]


@asynccontextmanager
async def fleet_of(nodes: Sequence[FakeNode], start: bool = True):
    fleet = Fleet("gw", CONFIG.nodes, time.monotonic, Profiles())
    if start:
        for node in nodes:
            await node.start()
    fleet.set_nodes([node.address for node in nodes])
    try:
        await up(fleet, len(nodes) if start else 0)
        yield fleet
    finally:
        await fleet.stop()
        for node in nodes:
            await node.stop()


async def up(fleet: Fleet, count: int) -> None:
    ready = asyncio.Event()

    def check() -> None:
        if len(fleet.states()) >= count:
            ready.set()

    fleet.wait(check)
    check()
    await asyncio.wait_for(ready.wait(), 60)
    fleet.unwait(check)


async def run_one(fleet: Fleet, image_plan: ImagePlan | None = None) -> tuple[ImageRun, Outcome]:
    outcome = Outcome()
    run = ImageRun(image_plan or plan(), fleet, CONFIG, outcome)
    run.start()
    await outcome.result()
    assert run.closed
    assert run.attempts_open == 0
    assert fleet.waiting == 0
    assert all(connection.assigned == 0 for connection in fleet.connections.values())
    return run, outcome


def assert_image(outcome: Outcome) -> None:
    result = outcome.end.result()
    assert not isinstance(result, KubeDiffusionError), result
    assert result.inline == expected_image()


def script_for(stage: str, step: int, answer, times: int = 1):
    """Answers once (or so often) at that step of that stage."""
    left = [times]

    def script(node, assign, at):
        if assign.stage == stage and at == step and left[0] > 0:
            left[0] -= 1
            return answer(assign) if callable(answer) else answer
        return None

    return script
