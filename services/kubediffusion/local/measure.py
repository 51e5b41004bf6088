# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a workflow's stages cost on live nodes of this machine.

Everything goes the whole way, through the gateway. A batch of a denoiser is what its node makes of
requests that come together in ``numerics: fast``. Their first steps and their last ones run in
smaller batches, so each batch is measured at two lengths, of which the difference counts.
"""

from __future__ import annotations

import asyncio
import io
import statistics
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from PIL import Image

from kubediffusion.client.core import build_request
from kubediffusion.client.events import Finished, StageTime, event_of
from kubediffusion.errors import Internal, InvalidInput
from kubediffusion.local.runtime import LocalRuntime
from kubediffusion.simulate.measured import Forward, Loaded, Shape
from kubediffusion.v1alpha1 import gateway_pb2
from kubediffusion.workflow import ResolvedWorkflow, Value, bind
from kubediffusion.workflow.colocation import is_helper

DENOISE = "denoise"
# In which the time of a step is told apart from what comes before and after all steps.
_SHORT, _LONG = 6, 16
_GROWS = ("denoise", "decode", "encode_image")


@dataclass(frozen=True, slots=True)
class Ask:
    """What to measure: each of `sizes` (width, height) with each of `batches` requests together,
    one of which is 1, `rounds` times."""

    inputs: Mapping[str, Value]
    sizes: Sequence[tuple[int, int]] = ()
    batches: Sequence[int] = (1, 2, 4)
    rounds: int = 5


@dataclass(frozen=True, slots=True)
class Found:
    loads: Sequence[Loaded]
    forwards: Sequence[Forward]
    shape: Shape
    device: str
    version: str
    memory_limit: int


async def measure(
    runtime: LocalRuntime,
    workflow: ResolvedWorkflow,
    ask: Ask,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Found:
    """Runs requests one after the other, or `batches` of them together, on a runtime that is ready.

    Raises InvalidInput where the workflow cannot be asked for that, and what a request may raise.
    """
    bench = _Bench(runtime, workflow, ask, on_progress)
    return await bench.run()


@dataclass(frozen=True, slots=True)
class _Variant:
    """Requests with these inputs, so many at a time."""

    inputs: Mapping[str, object]
    together: int


class _Bench:
    def __init__(
        self,
        runtime: LocalRuntime,
        workflow: ResolvedWorkflow,
        ask: Ask,
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        self._runtime = runtime
        self._workflow = workflow
        self._ask = ask
        self._on_progress = on_progress
        self._roles = {node.name: node.role for node in workflow.graph.nodes}
        self._controls = [
            role.removeprefix("controlnet.")
            for role, model in workflow.models.items()
            if is_helper(model.component)
        ]
        self._sizes = [*ask.sizes] or [self._default_size()]
        self._times: list[StageTime] = []
        self._done = 0
        variants = len(ask.batches) + len(self._controls)
        self._total = len(self._sizes) * variants * (ask.rounds + 1)

    async def run(self) -> Found:
        forwards: list[Forward] = []
        for size in self._sizes:
            forwards += await self._of_size(size)
        nodes = [
            each.description
            for each in self._runtime.gateway.fleet.connections.values()
            if each.description is not None
        ]
        statuses = {status.identity: status for node in nodes for status in node.models}
        loads = [
            Loaded(role, model.identity, status.load_seconds, status.nbytes, status.digest)
            for role, model in self._workflow.models.items()
            if (status := statuses.get(model.identity)) is not None
        ]
        return Found(
            loads,
            forwards,
            self._shape(),
            device=", ".join(sorted({node.device for node in nodes})),
            version=nodes[0].version if nodes else "",
            memory_limit=min((node.memory_limit for node in nodes), default=0),
        )

    # ------------------------------------------------------------ one size

    async def _of_size(self, size: tuple[int, int]) -> list[Forward]:
        plain = self._inputs(size)
        batches = [_Variant(plain, together) for together in self._ask.batches]
        controlled = [_Variant(self._inputs(size, name), 1) for name in self._controls]
        steps = await self._step_seconds([*batches, *controlled], f"{size[0]}×{size[1]}")
        alone = steps[self._ask.batches.index(1)]
        found = self._one_shots(size)
        for batch, seconds in zip(batches, steps, strict=False):
            found.append(self._forward("transformer", DENOISE, size, batch.together, seconds))
        for name, seconds in zip(self._controls, steps[len(batches) :], strict=True):
            # It runs in the denoiser's step, on the same node: what it adds is its own.
            added = max(0.0, seconds - alone)
            found.append(self._forward(f"controlnet.{name}", "control", size, 1, added))
        return found

    def _one_shots(self, size: tuple[int, int]) -> list[Forward]:
        """Of every stage that is one call: the requests that ran by themselves have timed them."""
        by_role: dict[tuple[str, str], list[float]] = {}
        for time in self._times:
            if time.stage != DENOISE:
                key = (self._roles[time.task], time.stage)
                by_role.setdefault(key, []).append(time.run_seconds)
        return [
            self._forward(role, stage, size, 1, statistics.median(seconds))
            for (role, stage), seconds in by_role.items()
        ]

    def _forward(
        self, role: str, stage: str, size: tuple[int, int], together: int, seconds: float
    ) -> Forward:
        model = self._workflow.models[role].identity
        grows, pixels = stage in _GROWS, float(size[0] * size[1])
        branches = self._branches if stage in (DENOISE, "control") else 1
        return Forward(
            model,
            stage,
            self._fingerprint(model),
            f"{size[0]}x{size[1]}",
            together * branches,
            seconds,
            # A gateway's estimates are of requests that run by themselves.
            0.0 if together > 1 or stage == "control" else pixels if grows else 1.0,
            self._ask.rounds,
        )

    async def _step_seconds(self, variants: Sequence[_Variant], size: str) -> list[float]:
        """Median seconds of one step of each, all of them in turn: what else the machine does
        meanwhile does it to each."""
        self._times.clear()
        differences: list[list[float]] = [[] for _ in variants]
        for number in range(self._ask.rounds + 1):
            for variant, found in zip(variants, differences, strict=True):
                self._on_progress(f"{size}, {variant.together} at a time", self._done, self._total)
                short, long = [await self._denoise_seconds(variant, n) for n in (_SHORT, _LONG)]
                found.append((long - short) / (_LONG - _SHORT))
                self._done += 1
            if number == 0:  # which warmed caches
                self._times.clear()
        return [max(0.0, statistics.median(each[1:])) for each in differences]

    async def _denoise_seconds(self, variant: _Variant, steps: int) -> float:
        finished = await self._together({**variant.inputs, "steps": steps}, variant.together)
        times = [stage for each in finished for stage in each.stages]
        if variant.together == 1:
            self._times += times
        return statistics.median(time.run_seconds for time in times if time.stage == DENOISE)

    async def _together(self, inputs: Mapping[str, object], count: int) -> list[Finished]:
        numerics = "fast" if count > 1 else ""
        requests = [
            build_request(
                self._workflow.name, "", inputs={**inputs, "seed": seed}, numerics=numerics
            )
            for seed in range(count)
        ]
        return list(await asyncio.gather(*(self._one(each) for each in requests)))

    async def _one(self, request: gateway_pb2.GenerateRequest) -> Finished:
        messages: AsyncGenerator[gateway_pb2.GenerateEvent, None] = self._runtime.generate(request)
        async with aclosing(messages) as events:
            async for message in events:
                event = event_of(message)
                if isinstance(event, Finished):
                    return event
        raise Internal("the stream of events ended before the request was finished")

    # ------------------------------------------------------------ of the workflow

    def _inputs(self, size: tuple[int, int], control: str = "") -> dict[str, object]:
        inputs: dict[str, object] = {**self._ask.inputs}
        known = self._workflow.inputs
        if "width" in known and "height" in known:
            inputs |= {"width": size[0], "height": size[1]}
        if control:
            picture = io.BytesIO()
            Image.linear_gradient("L").resize(size).convert("RGB").save(picture, "PNG")
            inputs[f"control.{control}"] = picture.getvalue()
        return inputs

    def _default_size(self) -> tuple[int, int]:
        """The workflow's own, or its model's, or the one that was given as inputs."""
        known = self._runtime.gateway.fleet.facts
        models = self._workflow.models
        facts = {r: known[m.identity] for r, m in models.items() if m.identity in known}
        values = bind(self._workflow, dict(self._ask.inputs), {}, facts, 0).values
        width, height = values.get("width"), values.get("height")
        if not isinstance(width, int) or not isinstance(height, int):
            raise InvalidInput(
                f"workflow {self._workflow.name} has no size of its own: give one", field="--size"
            )
        return width, height

    @property
    def _branches(self) -> int:
        """Forwards a step: two with classifier-free guidance."""
        guidance = self._ask.inputs.get("guidance")
        if guidance is None and "guidance" in self._workflow.inputs:
            guidance = self._workflow.inputs["guidance"].default
        return 2 if isinstance(guidance, int | float) and guidance > 1 else 1

    def _fingerprint(self, model: str) -> str:
        for connection in self._runtime.gateway.fleet.connections.values():
            node = connection.description
            if node is not None and any(each.identity == model for each in node.models):
                return node.fingerprint
        return ""

    def _shape(self) -> Shape:
        models, steps = self._workflow.models, self._workflow.inputs["steps"].default
        return Shape(
            name=self._workflow.name,
            family=self._workflow.name,
            encoders=[m.identity for r, m in models.items() if r.startswith("text_encoder")],
            denoiser=models["transformer"].identity,
            decoder=models["vae"].identity,
            controls=[models[f"controlnet.{name}"].identity for name in self._controls],
            steps=steps if isinstance(steps, int) else 28,
            branches=self._branches,
        )
