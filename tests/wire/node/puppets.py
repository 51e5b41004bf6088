# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A model family whose every step waits for the test, and a gateway's end of a Work stream."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import torch

from kubediffusion import rpc
from kubediffusion.errors import InvalidInput, SourceUnavailable, UnsupportedModel
from kubediffusion.models.base import CheckpointState, Family, LoadSpec, Lora, StepCache
from kubediffusion.node.config import NodeConfig
from kubediffusion.node.library import Library
from kubediffusion.node.server import NodeServer
from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc, tensor_pb2

WAIT = 120.0  # no test waits so long, even on a busy machine; a broken one ends


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@dataclass
class Strings:
    """How a test holds the models: steps pass while the gate is open, or one for each token."""

    open: bool = True
    tokens: int = 0
    ran: list[str] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    fail: Callable[[str], None] = lambda what: None
    # Called before each lease's part of a step, with its label and the batch's size.
    fail_within: Callable[[str, int], None] = lambda label, batch: None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def hold(self) -> None:
        with self.changed:
            self.open = False

    def release(self, steps: int | None = None) -> None:
        with self.changed:
            if steps is None:
                self.open = True
            else:
                self.tokens += steps
            self.changed.notify_all()

    def pull(self, what: str) -> None:
        with self.changed:
            self.ran.append(what)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.open or self.tokens, WAIT)
            if not self.open:
                self.tokens -= 1
        self.fail(what)

    async def started(self, what: str, times: int = 1) -> None:
        """Waits until the device thread is at `what`."""

        def wait() -> bool:
            with self.changed:
                return self.changed.wait_for(lambda: self.ran.count(what) >= times, WAIT)

        assert await asyncio.to_thread(wait), f"{what} never ran; there were {self.ran}"


class PuppetDenoising:
    def __init__(self, label: str, latents: torch.Tensor, step: int, total: int) -> None:
        self.label, self.latents, self.step, self.total_steps = label, latents, step, total

    def advance(self) -> None:
        # Depends on the step and on every bit before it, so that a wrong resume shows.
        self.latents = torch.sin(self.latents * 1.7 + self.step)
        self.step += 1

    def checkpoint(self) -> CheckpointState:
        return CheckpointState(self.step, self.total_steps, {"latents": self.latents})

    def preview(self) -> np.ndarray:
        return (self.latents.abs() * 255).to(torch.uint8).numpy().reshape(2, -1, 1).repeat(3, 2)

    def finish(self) -> Mapping[str, Any]:
        return {"latents": self.latents}


class PuppetModel:
    def __init__(self, spec: LoadSpec, strings: Strings) -> None:
        self.spec, self.strings = spec, strings
        self.unloaded = False
        self.loras: list[Sequence[Lora]] = []
        self.budgets: dict[str, float | None] = {}
        self.step_caches: dict[str, StepCache | None] = {}

    @property
    def stages(self) -> tuple[str, ...]:
        return ("denoise",) if self.spec.component == "transformer" else ("encode", "decode")

    facts: Mapping[str, Any] = {"patch_size": 2, "name": "puppet", "exact": True}

    @property
    def nbytes(self) -> int:
        return int(self.spec.options.get("nbytes", "1000"))

    def run(self, stage: str, inputs: Mapping[str, Any], loras: Sequence[Lora] = ()) -> Any:
        self.loras.append(loras)
        self.strings.pull(str(inputs.get("text", stage)))
        size = inputs.get("size", 4)
        if not isinstance(size, int) or size < 0:
            raise InvalidInput(f"size is {size!r}", field="size")
        seed = int(inputs.get("seed", 0))
        embeds = torch.full((size,), float(seed), dtype=torch.bfloat16)
        latents = inputs.get("latents")
        total = float(latents.double().sum()) if isinstance(latents, torch.Tensor) else 0.0
        image = np.full((2, 2, 3), seed % 256, np.uint8)
        return {"embeds": embeds, "image": image, "sum": total, "words": ["a", 1]}

    def unload(self) -> None:
        self.unloaded = True


class PuppetDenoiser(PuppetModel):
    def start(
        self,
        inputs: Mapping[str, Any],
        loras: Sequence[Lora] = (),
        resume: CheckpointState | None = None,
        controlnets: Sequence[Any] = (),
        budget: float | None = None,
        step_cache: StepCache | None = None,
    ) -> PuppetDenoising:
        label = str(inputs.get("label", "lease"))
        self.budgets[label] = budget
        self.step_caches[label] = step_cache
        if resume is not None:
            latents = resume.tensors["latents"]
            return PuppetDenoising(label, latents, resume.step, resume.total_steps)
        generator = torch.Generator().manual_seed(int(inputs.get("seed", 0)))
        latents = torch.randn(int(inputs.get("size", 8)), generator=generator)
        return PuppetDenoising(label, latents, 0, int(inputs.get("steps", 4)))

    def batch_key(self, denoising: Any) -> object:
        return denoising.latents.shape

    def advance(self, batch: Sequence[Any]) -> None:
        self.strings.batches.append(len(batch))
        self.strings.pull("+".join(d.label for d in batch))
        for denoising in batch:
            self.strings.fail_within(denoising.label, len(batch))
            denoising.advance()


class Shelf:
    """Families and sources of a test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.strings = Strings()
        self.models: dict[str, PuppetModel] = {}
        self.opened: list[str] = []
        self.down = 0  # so many more times the source does not answer
        self.slow: dict[str, threading.Event] = {}  # sources that answer once their event is set

    def load(self, spec: LoadSpec) -> PuppetModel:
        if message := spec.options.get("broken"):
            raise UnsupportedModel(message, reason="WrongArchitecture")
        if spec.options.get("exhausting"):
            raise MemoryError("no room")
        kind = PuppetDenoiser if spec.component == "transformer" else PuppetModel
        model = kind(spec, self.strings)
        self.models[spec.identity] = model
        return model

    def family(self, name: str) -> Family:
        if name != "puppet":
            raise UnsupportedModel(f"no family {name!r}", reason="UnknownFamily")
        return Family("puppet", ("text_encoder", "transformer", "vae", "controlnet"), self.load)

    def open(self, uri: str, revision: str = "", **options: Any) -> Any:
        self.opened.append(uri)
        if uri in self.slow:
            self.slow[uri].wait(WAIT)
        if self.down:
            self.down -= 1
            raise SourceUnavailable(f"{uri} does not answer")
        folder = self.root / uri.removeprefix("test://")
        folder.mkdir(parents=True, exist_ok=True)
        if progress := options.get("progress"):
            progress(10, 10)
        return type("Local", (), {"path": folder})()

    @property
    def library(self) -> Library:
        return Library(self.family, self.open)


def spec(
    identity: str, component: str = "text_encoder", uri: str = "test://w", **fields: Any
) -> node_pb2.ModelSpec:
    return node_pb2.ModelSpec(
        identity=identity, family="puppet", component=component, uri=uri, **fields
    )


MODELS = (spec("enc"), spec("dit", "transformer"), spec("vae", "vae"))


class Rig:
    """A node in this process, on a unix socket, with puppets on it."""

    def __init__(
        self, folder: Path, node_id: str = "n1", shelf: Shelf | None = None, **config: Any
    ) -> None:
        self.shelf = shelf or Shelf(folder)
        self.strings = self.shelf.strings
        self.clock = Clock()
        self.config = NodeConfig(
            node_id=node_id, address=f"unix:{folder}/{node_id}.sock", threads=1, **config
        )
        self.server = NodeServer(self.config, self.shelf.library, now=self.clock)
        self.store = self.server.store
        self._channels: list[grpc.aio.Channel] = []
        self._residency_changed = asyncio.Event()
        told = self.server.residency.on_change

        def on_change() -> None:
            told()
            self._residency_changed.set()

        self.server.residency.on_change = on_change

    async def start(self, models: Sequence[node_pb2.ModelSpec] = MODELS) -> Rig:
        await self.server.start()
        self.stub = node_pb2_grpc.ModelNodeStub(self.channel())
        if models:
            await self.plan(1, models)
            await self.settled()
        return self

    def channel(self) -> grpc.aio.Channel:
        self._channels.append(rpc.connect(self.server.address))
        return self._channels[-1]

    async def plan(self, generation: int, models: Sequence[node_pb2.ModelSpec]) -> Any:
        return await self.stub.SetResidency(
            node_pb2.SetResidencyRequest(generation=generation, planner="test", models=models)
        )

    async def statuses(self) -> dict[str, node_pb2.ModelStatus]:
        node = await self.stub.Describe(node_pb2.DescribeRequest())
        return {status.identity: status for status in node.models}

    async def settled(self) -> dict[str, node_pb2.ModelStatus]:
        """Waits until what is planned is there or has failed, and nothing else is there."""
        calm = (node_pb2.MODEL_STATE_READY, node_pb2.MODEL_STATE_FAILED)
        residency = self.server.residency
        await self.until(
            lambda: (
                {s.identity for s in residency.statuses()} == set(residency._planned)
                and all(s.state in calm for s in residency.statuses())
            )
        )
        return await self.statuses()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a state of the residency; looks again at each of its changes."""
        async with asyncio.timeout(WAIT):
            while not condition():
                self._residency_changed.clear()
                await self._residency_changed.wait()

    async def gateway(self, gateway_id: str = "g1", lease_seconds: int = 30) -> Gateway:
        gateway = Gateway(self.channel(), gateway_id)
        await gateway.open(lease_seconds)
        return gateway

    async def stop(self) -> None:
        self.strings.release()
        await self.server.stop(grace=0.2)
        for channel in self._channels:
            await channel.close()


class Gateway:
    """A gateway's end of a Work stream."""

    def __init__(self, channel: grpc.aio.Channel, gateway_id: str) -> None:
        self.gateway_id = gateway_id
        self.call: Any = node_pb2_grpc.ModelNodeStub(channel).Work()
        self.events: list[tuple[str, Any]] = []
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.error: grpc.aio.AioRpcError | None = None
        self.ended = False

    async def open(self, lease_seconds: int = 30) -> None:
        hello = node_pb2.Hello(
            gateway_id=self.gateway_id,
            protocol=node_pb2.ProtocolRange(min=1, max=1),
            lease_seconds=lease_seconds,
        )
        await self.send(hello=hello)
        self._task = asyncio.create_task(self._read())
        self.node = (await self.event("welcome")).node

    async def send(self, **message: Any) -> None:
        await self.call.write(node_pb2.WorkRequest(**message))

    async def assign(
        self,
        request: str,
        task: str = "encode",
        model: str = "enc",
        stage: str = "encode",
        epoch: int = 1,
        outputs: Sequence[str] = (),
        inputs: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        key = node_pb2.TaskKey(request_id=request, task=task, epoch=epoch)
        values = {name: value(v) for name, v in (inputs or {}).items()}
        await self.send(
            assign=node_pb2.Assign(
                key=key, model=model, stage=stage, inputs=values, outputs=outputs, **fields
            )
        )

    async def denoise(
        self, request: str, epoch: int = 1, every: int = 1, resume: Any = None, **fields: Any
    ) -> None:
        inputs = {"label": request, "seed": 7, **fields.pop("inputs", {})}
        lease = node_pb2.Lease(
            checkpoint_every=every, preview_every=fields.pop("previews", 0), resume=resume
        )
        lease.helpers.extend(fields.pop("helpers", ()))
        await self.assign(
            request, "denoise", "dit", "denoise", epoch, ["latents"], inputs, lease=lease, **fields
        )

    async def event(self, kind: str, request: str = "", seen: int = 0) -> Any:
        """The first such event (after `seen` of them), past ones included."""
        async with asyncio.timeout(WAIT):
            while True:
                found = self.all(kind, request)
                if len(found) > seen:
                    return found[seen]
                assert not self.ended, f"the stream ended ({self.error}); {self.kinds()}"
                self._news.clear()
                await self._news.wait()

    async def end_of(self, request: str) -> tuple[str, Any]:
        """How the request's one task ended."""
        ends = ("done", "failed", "yielded", "declined")
        async with asyncio.timeout(WAIT):
            while True:
                for kind, body in self.events:
                    if kind in ends and body.key.request_id == request:
                        return kind, body
                assert not self.ended, f"the stream ended: {self.error}"
                self._news.clear()
                await self._news.wait()

    async def load(self, condition: Callable[[node_pb2.LoadReport], bool]) -> node_pb2.LoadReport:
        async with asyncio.timeout(WAIT):
            while True:
                for report in reversed(self.all("load")):
                    if condition(report):
                        return report
                self._news.clear()
                await self._news.wait()

    def all(self, kind: str, request: str = "") -> list[Any]:
        return [
            body
            for k, body in self.events
            if k == kind and (not request or body.key.request_id == request)
        ]

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events if kind != "load"]

    async def over(self) -> grpc.aio.AioRpcError | None:
        async with asyncio.timeout(WAIT):
            while not self.ended:
                self._news.clear()
                await self._news.wait()
        return self.error

    async def leave(self) -> None:
        self.call.cancel()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        try:
            async for event in self.call:
                kind = event.WhichOneof("kind")
                self.events.append((kind, getattr(event, kind)))
                self._news.set()
        except grpc.aio.AioRpcError as error:
            self.error = error
        finally:
            self.ended = True
            self._news.set()


def value(plain: Any) -> tensor_pb2.Value:
    from kubediffusion import tensors

    return plain if isinstance(plain, tensor_pb2.Value) else tensors.encode_value(plain)
