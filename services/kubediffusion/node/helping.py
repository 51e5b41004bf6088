# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""This node as the helper of another one's lease: the Assist RPC.

Each step's part is a one-shot task in this node's own queue, in the class of its lease: it is
ordered, counted, reported and cancelled as any other. A session has one of them at a time. A
branch of guidance is computed only while nobody else needs this node: as soon as somebody does,
the session is ended and the lease goes on alone. A ControlNet's lasts as long as its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import grpc
import grpc.aio

from kubediffusion.errors import InvalidInput, KubeDiffusionError, Unavailable
from kubediffusion.models.base import Helper, Helping, Lora, Part, PartStep, PortValue
from kubediffusion.node import ports
from kubediffusion.node.failures import failure_of
from kubediffusion.node.inputs import Inputs, UndeclaredError, declared
from kubediffusion.node.residency import Residency
from kubediffusion.node.session import (
    DEFAULT_LEASE_SECONDS,
    EOF,
    MAX_NAME,
    PROTOCOL,
    Session,
)
from kubediffusion.node.sharing import EXACT_BRANCH, PARTS
from kubediffusion.node.tasks import Resident, Task
from kubediffusion.telemetry.metrics import NodeMetrics
from kubediffusion.tensors import TensorStore, references, stored
from kubediffusion.v1alpha1 import node_pb2, tensor_pb2

if TYPE_CHECKING:
    from kubediffusion.node.core import Node

# Sessions at a time; more are refused.
MAX_SESSIONS = 64
# Once a session was ended here, its lease's node gets so long to pull the last part.
LINGER_SECONDS = 5.0
OUTPUT = "parts"


class Helpers:
    """The sessions of this node. All methods are for the event loop's thread."""

    def __init__(
        self,
        node: Node,
        residency: Residency,
        inputs: Inputs,
        store: TensorStore,
        metrics: NodeMetrics,
        fingerprint: str,
        now: Callable[[], float],
    ) -> None:
        self.node = node
        self.residency = residency
        self.inputs = inputs
        self.store = store
        self.fingerprint = fingerprint
        self.now = now
        self._metrics = metrics
        self._sessions: set[HelpSession] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    async def serve(self, context: grpc.aio.ServicerContext) -> None:
        """An Assist call from its opening to its end."""
        message = await context.read()
        if message is EOF or message.WhichOneof("kind") != "open":
            raise InvalidInput("the first message of an Assist stream must be AssistOpen")
        try:
            session = HelpSession(self, message.open)
        except KubeDiffusionError as error:
            await context.write(failed(message.open.key, error))
            return
        self._sessions.add(session)
        self._metrics.helping.set(len(self))
        self.node.reporter.changed()
        try:
            await session.serve(context)
        finally:
            session.close()
            self._sessions.discard(session)
            self._metrics.helping.set(len(self))
            self.node.reporter.changed()

    def give_way(self) -> None:
        """Somebody needs this node: whoever can go on without it does."""
        for session in self._sessions:
            if session.part is Part.BRANCH:
                session.end("others wait for this node")

    def end(self, why: str, resident: Resident | None = None) -> None:
        """All sessions, or those with that model."""
        for session in self._sessions:
            if resident is None or session.resident is resident:
                session.end(why)


class HelpSession:
    """One lease's part, computed here."""

    def __init__(self, helpers: Helpers, opening: node_pb2.AssistOpen) -> None:
        """Raises InvalidInput, or Unavailable where another node, or none, should help."""
        self._helpers = helpers
        self._opening = opening
        self.part = _part(opening)
        self.resident = self._admit()
        self._loras_declared = _declared(opening, self.resident)
        self._session = Session(f"help/{uuid4().hex}", DEFAULT_LEASE_SECONDS)
        self._over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._steps = itertools.count()
        self._task: Task | None = None
        self._kept: list[str] = []
        self._constants: Mapping[str, PortValue] = {}
        self._loras: list[Lora] = []
        self._helping: Helping | None = None
        self._step_seconds = 0.0
        # A stream is read by one at a time, and a reading is not given up.
        self._reading: asyncio.Future[Any] | None = None
        self._deadline: float | None = None
        if opening.HasField("remaining_ms"):
            self._deadline = helpers.now() + opening.remaining_ms / 1000

    def _admit(self) -> Resident:
        helpers, opening = self._helpers, self._opening
        key, node = opening.key, self._helpers.node
        if not (0 < len(key.request_id) <= MAX_NAME and 0 < len(key.task) <= MAX_NAME):
            raise InvalidInput(f"a request and a task have names of 1 to {MAX_NAME} characters")
        theirs = opening.protocol
        if min(theirs.max, PROTOCOL.max) < max(theirs.min, PROTOCOL.min):
            raise Unavailable(f"this node speaks protocol {PROTOCOL.min} to {PROTOCOL.max}")
        if node.draining:
            raise Unavailable("the node is draining")
        if len(helpers) >= MAX_SESSIONS:
            raise Unavailable(f"{len(helpers)} leases are helped here already")
        if self.part is Part.BRANCH and any(task.call is None for task in node.tasks.values()):
            raise Unavailable("others wait for this node")
        resident = helpers.residency.ready_model(opening.helper.model)
        if resident is None:
            raise Unavailable(f"model {opening.helper.model} is not ready here")
        if not isinstance(resident.loaded, Helper):
            raise InvalidInput(f"model {opening.helper.model} cannot help", field="helper")
        for ref in self._references():
            ports.check(ref)
        return resident

    def _references(self) -> Iterator[tensor_pb2.TensorRef]:
        for value in self._opening.inputs.values():
            yield from references(value)

    # ------------------------------------------------------------ the session

    def end(self, why: str) -> None:
        """At the next boundary: a part that is being computed is still handed out."""
        if not self._over.done():
            self._over.set_result(why)
            if self._task is not None and self._task.started is None:
                self._helpers.node.withdraw(self._task)

    def close(self) -> None:
        """Nothing of it stays here."""
        if self._task is not None:
            self._helpers.node.withdraw(self._task)
        if self._reading is not None:
            self._reading.cancel()
        request_id = self._opening.key.request_id
        self._helpers.store.release(self._session.gateway_id, [request_id])
        self._helping = None

    async def serve(self, context: grpc.aio.ServicerContext) -> None:
        try:
            await self._prepare()
            opened = node_pb2.AssistOpened(fingerprint=self._helpers.fingerprint)
            await context.write(node_pb2.AssistResponse(opened=opened))
            while (step := await self._next(context)) is not None:
                self._free()  # that it asks again says that it has the last ones
                await self._answer(context, step)
        except KubeDiffusionError as error:
            await context.write(failed(self._opening.key, error))
            await self._linger(context)

    async def _prepare(self) -> None:
        inputs, opening = self._helpers.inputs, self._opening
        fetched = await inputs.pull(self._references())
        self._constants = {
            port: ports.decode(value, fetched) for port, value in opening.inputs.items()
        }
        self._loras = await inputs.loras(opening.loras, self._loras_declared)

    async def _next(self, context: grpc.aio.ServicerContext) -> node_pb2.AssistStep | None:
        """The next question; None at the stream's end. Raises Unavailable once it is over."""
        reading = self._read(context)
        await asyncio.wait({reading, self._over}, return_when=asyncio.FIRST_COMPLETED)
        if self._over.done():
            raise Unavailable(self._over.result())
        message, self._reading = reading.result(), None
        ended = message is EOF or message.WhichOneof("kind") != "step"
        return None if ended else message.step

    def _read(self, context: grpc.aio.ServicerContext) -> asyncio.Future[Any]:
        if self._reading is None:
            self._reading = asyncio.ensure_future(context.read())
        return self._reading

    async def _linger(self, context: grpc.aio.ServicerContext) -> None:
        """Until the other side has what it was given last."""
        if not self._kept:
            return
        with contextlib.suppress(TimeoutError, grpc.RpcError, grpc.aio.UsageError):
            async with asyncio.timeout(LINGER_SECONDS):
                await self._read(context)

    async def _answer(self, context: grpc.aio.ServicerContext, step: node_pb2.AssistStep) -> None:
        node, store = self._helpers.node, self._helpers.store
        ports.check(step.latents)
        latents = ports.tensor(step.latents, await self._helpers.inputs.pull([step.latents]))
        store.touch(self._session.gateway_id, DEFAULT_LEASE_SECONDS)
        wanted = PartStep(step.step, step.timestep, latents, step.scale)
        task = self._task = self._make_task(lambda: self._compute(wanted))
        node.submit(task)
        event = await self._session.outbox.next()
        self._task = None
        if event is None or event.WhichOneof("kind") != "done":
            why = event.failed.message if event is not None else "the node is stopping"
            raise Unavailable(self._over.result() if self._over.done() else why)
        self._step_seconds = event.done.timing.run_seconds
        parts = event.done.outputs[OUTPUT]
        self._kept = [ref.id for ref in stored(parts)]
        items = parts.list.values
        for index, item in enumerate(items):
            output = node_pb2.AssistOutput(
                step=step.step, index=index, count=len(items), tensor=item.tensor
            )
            await context.write(node_pb2.AssistResponse(output=output))

    def _compute(self, step: PartStep) -> Mapping[str, PortValue]:
        """On the device's thread."""
        if self._helping is None:
            model = self.resident.loaded
            assert isinstance(model, Helper)
            self._helping = model.help(self.part, self._constants, self._loras)
            self._constants = {}
        return {OUTPUT: [*self._helping.compute(step)]}

    def _make_task(self, call: Callable[[], Mapping[str, PortValue]]) -> Task:
        opening, helpers = self._opening, self._helpers
        key = node_pb2.TaskKey(
            request_id=opening.key.request_id,
            task=f"{self._session.gateway_id}/{next(self._steps)}",
            epoch=opening.key.epoch,
        )
        assign = node_pb2.Assign(
            key=key,
            model=opening.helper.model,
            stage=self.part.value,
            outputs=[OUTPUT],
            numerics=opening.numerics,
            tenant=opening.tenant,
            weight=opening.weight,
            priority=opening.priority,
            traceparent=opening.traceparent,
            expected_seconds=self._step_seconds,
        )
        if self._deadline is not None:
            assign.remaining_ms = max(0, int((self._deadline - helpers.now()) * 1000))
        return helpers.node.make(self._session, assign, self.resident, call=call)

    def _free(self) -> None:
        for tensor_id in self._kept:
            self._helpers.store.discard(tensor_id)
        self._kept = []


def _part(opening: node_pb2.AssistOpen) -> Part:
    part = PARTS.get(opening.helper.kind)
    if part is None:
        raise InvalidInput("this node does not know such helpers", field="helper.kind")
    if part is Part.BRANCH and opening.numerics != node_pb2.NUMERICS_FAST:
        raise InvalidInput(EXACT_BRANCH, field="numerics")
    return part


def _declared(opening: node_pb2.AssistOpen, resident: Resident) -> tuple[node_pb2.LoraUse, ...]:
    try:
        return declared(opening, resident.spec)
    except UndeclaredError as error:
        raise Unavailable(str(error)) from None


def failed(key: node_pb2.TaskKey, error: KubeDiffusionError) -> node_pb2.AssistResponse:
    _, reason = failure_of(error)
    if reason == node_pb2.FAILURE_REASON_INTERNAL:
        reason = node_pb2.FAILURE_REASON_HELPER_LOST
    message = node_pb2.Failed(key=key, reason=reason, message=error.message, field=error.field)
    return node_pb2.AssistResponse(failed=message)
