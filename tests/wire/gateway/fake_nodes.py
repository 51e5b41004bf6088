# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Model nodes for tests of the gateway: real gRPC, arithmetic that shows any mistake.

"Denoising" is a chain of hashes, one a step, over everything that went in: a resumed request gives
the same image only if it went on from the right place with the right inputs.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import grpc
import grpc.aio

from kubediffusion import rpc
from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc, tensor_pb2

STAGES = {"text": ["encode"], "dit": ["denoise"], "vae": ["decode", "encode_image"]}
FACTS = {
    "text": {"max_length": 77},
    "dit": {"patch_size": 2, "sample_size": 4, "in_channels": 4},
    "vae": {"vae_scale_factor": 2, "latent_channels": 4},
}


def digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"|".join(parts)).digest()


def denoise_chain(state: bytes, steps: int) -> bytes:
    for step in range(steps):
        state = digest(state, str(step).encode())
    return state


class StoppedError(Exception):
    """Raised inside a task: it was cancelled or its node died."""


class FakeNode(node_pb2_grpc.ModelNodeServicer):
    """`script` is called before each step of each task as script(node, assign, step).

    It may return an event kind to send instead of going on (a Declined, Failed, Yielded), "die" to
    vanish, or an awaitable to wait for.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        models: Iterable[str] | Mapping[str, str] = ("text", "dit", "vae"),
        *,
        script: Callable[[FakeNode, node_pb2.Assign, int], object] | None = None,
        by_reference: bool = False,
        fingerprint: str = "cpu-1",
    ) -> None:
        self.address = f"unix:{path / (name + '.sock')}"
        self.name = name
        # Kinds (see STAGES) by identity.
        self.models = dict(models) if isinstance(models, Mapping) else {m: m for m in models}
        self.script = script or (lambda node, assign, step: None)
        self.by_reference = by_reference
        self.fingerprint = fingerprint
        self.incarnation = 0
        # What it says that pulling a task's inputs took, and running it, by stage.
        self.fetch_seconds = 0.0
        self.run_seconds: dict[str, float] = {}
        # Requests whose lease was asked back.
        self.yields: set[str] = set()
        # What it has to say to the caller, by stage.
        self.warnings: dict[str, list[str]] = {}
        self.assigned: list[node_pb2.Assign] = []
        self.steps: Counter[str] = Counter()
        self.cancelled: list[str] = []
        self.released: set[str] = set()
        self._noting: asyncio.Task[None] | None = None
        # What the last Renew said, for each of them.
        self.needed: list[set[str]] = []
        self.streams: list[asyncio.Queue[node_pb2.WorkEvent | None]] = []
        self.changed = asyncio.Condition()
        self.tensors: dict[str, bytes] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._server: grpc.aio.Server | None = None

    # ------------------------------------------------------------ life

    async def start(self) -> FakeNode:
        self.incarnation += 1
        self.tensors.clear()
        self._server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
        node_pb2_grpc.add_ModelNodeServicer_to_server(self, self._server)
        rpc.bind(self._server, self.address)
        await self._server.start()
        return self

    async def stop(self) -> None:
        """At once, as a killed process."""
        for task in list(self._tasks.values()):
            task.cancel()
        for stream in self.streams:
            stream.put_nowait(None)
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(0)

    async def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        async with asyncio.timeout(seconds), self.changed:
            await self.changed.wait_for(condition)

    async def _note(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def describe(self) -> node_pb2.DescribeResponse:
        statuses = [
            node_pb2.ModelStatus(
                identity=model,
                state=node_pb2.MODEL_STATE_READY,
                load_seconds=1.0,
                stages=STAGES[kind],
                facts={k: tensor_pb2.Value(integer=v) for k, v in FACTS[kind].items()},
            )
            for model, kind in self.models.items()
        ]
        return node_pb2.DescribeResponse(
            node_id=self.name,
            incarnation=f"{self.name}-{self.incarnation}",
            address=self.address,
            host_id="host",
            fingerprint=self.fingerprint,
            models=statuses,
            load=self.load(),
        )

    def load(self, **fields: object) -> node_pb2.LoadReport:
        return node_pb2.LoadReport(resident=self.models, **fields)  # type: ignore[arg-type]

    def report(self, **fields: object) -> None:
        """A LoadReport to every coordinator."""
        for stream in self.streams:
            stream.put_nowait(node_pb2.WorkEvent(load=self.load(**fields)))

    def send(self, **kind: object) -> None:
        for stream in self.streams:
            stream.put_nowait(node_pb2.WorkEvent(**kind))  # type: ignore[arg-type]

    # ------------------------------------------------------------ the wire

    async def Describe(self, request, context):
        return self.describe()

    async def Fetch(self, request, context):
        data = self.tensors.get(request.tensor_id)
        if data is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "gone")
        yield tensor_pb2.FetchChunk(data=data)

    async def Work(self, requests, context):
        out: asyncio.Queue[node_pb2.WorkEvent | None] = asyncio.Queue()
        out.put_nowait(
            node_pb2.WorkEvent(welcome=node_pb2.Welcome(node=self.describe(), protocol=1))
        )
        self.streams.append(out)
        reader = asyncio.create_task(self._read(requests, out))
        await self._note()
        try:
            while (event := await out.get()) is not None:
                yield event
        finally:
            reader.cancel()
            self.streams.remove(out)
            self._noting = asyncio.create_task(self._note())

    async def _read(self, requests, out) -> None:
        async for request in requests:
            kind = request.WhichOneof("kind")
            if kind == "assign":
                assign = request.assign
                self.assigned.append(assign)
                key = (assign.key.request_id, assign.key.task)
                if (old := self._tasks.pop(key, None)) is not None:
                    old.cancel()
                self._tasks[key] = asyncio.create_task(self._run(assign, out))
            elif kind == "cancel":
                self.cancelled.append(request.cancel.request_id)
                for (request_id, _), task in list(self._tasks.items()):
                    if request_id == request.cancel.request_id:
                        task.cancel()
            elif kind == "yield":
                self.yields.add(getattr(request, "yield").key.request_id)
            elif kind == "release":
                self.released.update(request.release.request_ids)
            elif kind == "renew":
                self.needed.append(set(request.renew.needed_models))
            await self._note()

    # ------------------------------------------------------------ the work

    async def _run(self, assign: node_pb2.Assign, out: asyncio.Queue) -> None:
        try:
            await self._work(assign, out)
        except StoppedError:
            return
        finally:
            key = (assign.key.request_id, assign.key.task)
            if self._tasks.get(key) is asyncio.current_task():
                del self._tasks[key]

    async def _ask(self, assign: node_pb2.Assign, step: int, out: asyncio.Queue) -> None:
        answer = self.script(self, assign, step)
        if answer is None:
            return
        if answer == "die":
            await self.stop()
            raise StoppedError
        if isinstance(answer, node_pb2.WorkEvent):
            out.put_nowait(answer)
            raise StoppedError
        await answer  # type: ignore[misc]

    async def _work(self, assign: node_pb2.Assign, out: asyncio.Queue) -> None:
        key = assign.key
        await self._ask(assign, -1, out)
        out.put_nowait(node_pb2.WorkEvent(accepted=node_pb2.Accepted(key=key)))
        state = await self._inputs(assign, out)
        steps = 0
        if assign.stage == "denoise":
            state, steps = await self._denoise(assign, state, out)
        elif assign.stage == "decode":
            state = (digest(state) * 6)[: 8 * 8 * 3]
        shape, dtype = (
            ([8, 8, 3], tensor_pb2.DTYPE_U8)
            if assign.stage == "decode"
            else ([len(state)], tensor_pb2.DTYPE_U8)
        )
        outputs = {
            port: tensor_pb2.Value(tensor=self._tensor(assign, port, state, shape, dtype))
            for port in assign.outputs
        }
        await self._ask(assign, -2, out)
        out.put_nowait(
            node_pb2.WorkEvent(
                done=node_pb2.Done(
                    key=key,
                    outputs=outputs,
                    warnings=self.warnings.get(assign.stage, ()),
                    timing=node_pb2.Timing(
                        run_seconds=self.run_seconds.get(assign.stage, 0.001),
                        fetch_seconds=self.fetch_seconds,
                        steps_run=steps,
                    ),
                )
            )
        )

    def _tensor(self, assign, port, data, shape, dtype) -> tensor_pb2.TensorRef:
        key = assign.key
        ref = tensor_pb2.TensorRef(
            id=f"{self.name}/{key.request_id}/{key.task}/{port}/{key.epoch}",
            shape=shape,
            dtype=dtype,
            nbytes=len(data),
            address=self.address,
            incarnation=f"{self.name}-{self.incarnation}",
        )
        if self.by_reference:
            self.tensors[ref.id] = data
        else:
            ref.inline = data
        return ref

    async def _inputs(self, assign: node_pb2.Assign, out: asyncio.Queue) -> bytes:
        parts: list[bytes] = []
        for port in sorted(assign.inputs):
            value = assign.inputs[port]
            parts.append(port.encode())
            if value.WhichOneof("kind") != "tensor":
                parts.append(value.SerializeToString(deterministic=True))
            elif value.tensor.HasField("inline"):
                parts.append(value.tensor.inline)
            else:
                parts.append(await self._pull(assign, value.tensor, out))
        return digest(*parts)

    async def _pull(self, assign, ref: tensor_pb2.TensorRef, out: asyncio.Queue) -> bytes:
        async with rpc.connect(ref.address) as channel:
            stub = node_pb2_grpc.ModelNodeStub(channel)
            request = tensor_pb2.FetchRequest(tensor_id=ref.id, incarnation=ref.incarnation)
            try:
                return b"".join([chunk.data async for chunk in stub.Fetch(request, timeout=60)])
            except grpc.aio.AioRpcError:
                out.put_nowait(
                    failed(
                        assign, node_pb2.FAILURE_REASON_INPUT_LOST, "gone", lost_tensors=[ref.id]
                    )
                )
                raise StoppedError from None

    async def _denoise(self, assign, state: bytes, out) -> tuple[bytes, int]:
        key, lease = assign.key, assign.lease
        total = int(assign.inputs["steps"].integer)
        first = 0
        if lease.HasField("resume"):
            assert lease.resume.fingerprint == self.fingerprint
            first, state = lease.resume.step, lease.resume.tensors["latents"].inline
        for step in range(first, total):
            await self._ask(assign, step, out)
            if key.request_id in self.yields:
                self.yields.discard(key.request_id)
                given = self.checkpoint(step, total, state) if step else None
                yielded = node_pb2.Yielded(key=key, checkpoint=given)
                out.put_nowait(node_pb2.WorkEvent(yielded=yielded))
                raise StoppedError
            state = digest(state, str(step).encode())
            self.steps[key.request_id] += 1
            progress = node_pb2.Progress(key=key, step=step + 1, total_steps=total)
            out.put_nowait(node_pb2.WorkEvent(progress=progress))
            if lease.preview_every and (step + 1) % lease.preview_every == 0 and step + 1 < total:
                pixels = (state * 6)[: 8 * 8 * 3]
                ref = tensor_pb2.TensorRef(
                    shape=[8, 8, 3], dtype=tensor_pb2.DTYPE_U8, nbytes=len(pixels), inline=pixels
                )
                preview = node_pb2.Preview(key=key, step=step + 1, image=ref)
                out.put_nowait(node_pb2.WorkEvent(preview=preview))
            if lease.checkpoint_every and (step + 1) % lease.checkpoint_every == 0:
                out.put_nowait(
                    node_pb2.WorkEvent(
                        checkpoint=node_pb2.CheckpointTaken(
                            key=key, checkpoint=self.checkpoint(step + 1, total, state)
                        )
                    )
                )
            await asyncio.sleep(0)
        return state, total - first

    def checkpoint(self, step: int, total: int, state: bytes) -> node_pb2.Checkpoint:
        latents = tensor_pb2.TensorRef(
            shape=[len(state)], dtype=tensor_pb2.DTYPE_U8, nbytes=len(state), inline=state
        )
        return node_pb2.Checkpoint(
            step=step,
            total_steps=total,
            tensors={"latents": latents},
            fingerprint=self.fingerprint,
        )


class Held:
    """A script that stops a stage at one of its steps, the denoiser in its second."""

    def __init__(self, stage: str = "denoise", step: int = 2) -> None:
        self.stage, self.step = stage, step
        self.reached, self.go = asyncio.Event(), asyncio.Event()

    def __call__(self, node: FakeNode, assign: node_pb2.Assign, step: int) -> object:
        if (assign.stage, step) == (self.stage, self.step):
            self.reached.set()
            return self.go.wait()
        return None


def failed(assign, reason, message="", **fields) -> node_pb2.WorkEvent:
    body = node_pb2.Failed(key=assign.key, reason=reason, message=message, **fields)
    return node_pb2.WorkEvent(failed=body)


def declined(assign, reason, message="") -> node_pb2.WorkEvent:
    body = node_pb2.Declined(key=assign.key, reason=reason, message=message)
    return node_pb2.WorkEvent(declined=body)
