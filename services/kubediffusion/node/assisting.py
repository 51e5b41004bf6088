# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The helpers of this node's own leases: a stream to each, from the lease's beginning to its end.

A helper that cannot be reached, refuses, fails, or is too slow is left at once and not asked again
by that lease: the device is told, and computes the part itself or fails the lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from kubediffusion import rpc
from kubediffusion.errors import InvalidInput, KubeDiffusionError, Unavailable
from kubediffusion.node import ports
from kubediffusion.node.device import Device
from kubediffusion.node.inputs import Inputs
from kubediffusion.node.session import PROTOCOL
from kubediffusion.node.sharing import Constants, Share
from kubediffusion.node.tasks import Task
from kubediffusion.scheduling.assist import patience
from kubediffusion.telemetry.metrics import NodeMetrics
from kubediffusion.tensors import TensorStore
from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc, tensor_pb2

# From opening the stream to the helper's word that it has the constants.
OPEN_SECONDS = 5.0
MAX_CHANNELS = 64
MAX_PARTS = 4096
EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]

log = logging.getLogger(__name__)


class Assisting:
    """All methods are for the event loop's thread."""

    def __init__(
        self, device: Device, inputs: Inputs, store: TensorStore, metrics: NodeMetrics
    ) -> None:
        self._device = device
        self._inputs = inputs
        self._store = store
        self._metrics = metrics
        self._links: dict[Share, _Link] = {}
        self._by_task: dict[int, list[_Link]] = {}
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()

    def begin(self, task: Task, share: Share, constants: Constants) -> None:
        if task.ended:
            self._free(share)
            return
        stub = node_pb2_grpc.ModelNodeStub(self._channel(share.helper.address))
        link = _Link(self, task, share, constants, stub)
        self._links[share] = link
        self._by_task.setdefault(task.sequence, []).append(link)

    def ask(self, share: Share, step: node_pb2.AssistStep) -> None:
        if (link := self._links.get(share)) is not None:
            link.ask(step)

    def end(self, task: Task) -> None:
        """The lease is over here, however it ended."""
        for link in self._by_task.pop(task.sequence, ()):
            link.close("done")

    async def stop(self) -> None:
        for link in list(self._links.values()):
            link.close("done")
        channels, self._channels = self._channels, OrderedDict()
        for channel in channels.values():
            await channel.close()

    # ------------------------------------------------------------ of links

    def joined(self, link: _Link) -> None:
        self._free(link.share)  # the helper has its own copies
        self._device.joined(link.task, link.share)

    async def answered(self, link: _Link, step: int, refs: Sequence[tensor_pb2.TensorRef]) -> None:
        fetched = await self._inputs.pull(refs)
        self._metrics.assisted_steps.labels(link.task.model, link.share.part.value).inc()
        self._device.answered(link.task, link.share, step, refs, fetched)

    def left(self, link: _Link, why: KubeDiffusionError) -> None:
        self._device.left(link.task, link.share, why)

    def closed(self, link: _Link, outcome: str) -> None:
        self._free(link.share)
        self._links.pop(link.share, None)
        labels = (link.task.model, link.share.part.value, outcome)
        self._metrics.assists.labels(*labels).inc()

    def check(self, link: _Link, opened: node_pb2.AssistOpened) -> None:
        """Raises Unavailable for a helper that computes other bits, where bits count."""
        if link.task.exact and opened.fingerprint != self._device.fingerprint:
            raise Unavailable(f"it is a {opened.fingerprint}, and would give other bits")

    def _free(self, share: Share) -> None:
        for tensor_id in share.constants:
            self._store.discard(tensor_id)
        share.constants.clear()

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = rpc.connect(address)
            used = {link.share.helper.address for link in self._links.values()} | {address}
            idle = [each for each in self._channels if each not in used]
            for old in idle[: max(0, len(self._channels) - MAX_CHANNELS)]:
                link = asyncio.ensure_future(self._channels.pop(old).close())
                link.add_done_callback(lambda _: None)
        self._channels.move_to_end(address)
        return self._channels[address]


class _Link:
    """One stream: a task that reads, and at most one question under way."""

    def __init__(
        self,
        owner: Assisting,
        task: Task,
        share: Share,
        constants: Constants,
        stub: node_pb2_grpc.ModelNodeStub,
    ) -> None:
        self.task = task
        self.share = share
        self._owner = owner
        self._stub = stub
        self._open = _open_message(task, share, constants)
        self._questions: asyncio.Queue[node_pb2.AssistStep] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None
        self._slow = False
        self._closed = False
        # The helper has said that it is there.
        self.opened = False
        self._running = asyncio.create_task(self._run(), name=f"helper of {task.name}")

    def ask(self, step: node_pb2.AssistStep) -> None:
        self._questions.put_nowait(step)
        share = self.share
        seconds = patience(self.task.own_seconds, answered=share.answered, required=share.required)
        self._timer = asyncio.get_running_loop().call_later(seconds, self._too_slow)

    def close(self, outcome: str) -> None:
        if not self._closed:
            self._closed = True
            self._in_time()
            self._running.cancel()
            self._owner.closed(self, outcome)

    # ------------------------------------------------------------ inside

    def _too_slow(self) -> None:
        self._lose("slow", Unavailable("it did not answer in time"))

    def _in_time(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _lose(self, outcome: str, why: KubeDiffusionError) -> None:
        if not self._closed:
            self._owner.left(self, why)
            self.close(outcome)

    async def _run(self) -> None:
        call: Any = self._stub.Assist(
            wait_for_ready=True
        )  # a first attempt may fail on a busy machine
        writer: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                await call.write(self._open)
                self._owner.check(self, _opened(await call.read()))
            self.opened = True
            self._owner.joined(self)
            writer = asyncio.create_task(self._write(call))
            await self._read(call)
        except asyncio.CancelledError:
            if self._closed:
                raise
            self._lose("lost", Unavailable("its stream was cancelled"))
        except TimeoutError:
            self._lose("refused", Unavailable(f"it did not open within {OPEN_SECONDS:g} s"))
        except _EndedError as error:
            self._lose("ended" if self.opened else "refused", Unavailable(str(error)))
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            known = (
                rpc.from_rpc_error(error, self.share.helper.address)
                if isinstance(error, grpc.RpcError)
                else Unavailable("its stream ended")
            )
            self._lose("lost" if self.opened else "refused", known)
        except KubeDiffusionError as error:
            self._lose("lost" if self.opened else "refused", error)
        except Exception as error:
            log.exception("helper of %s", self.task.name)
            self._lose("lost", Unavailable(f"unexpected {type(error).__name__}; see the log"))
        finally:
            if writer is not None:
                writer.cancel()
            call.cancel()

    async def _write(self, call: Any) -> None:
        try:
            while True:
                step = await self._questions.get()
                await call.write(node_pb2.AssistRequest(step=step))
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # whoever reads hears of it

    async def _read(self, call: Any) -> None:
        refs: list[tensor_pb2.TensorRef] = []
        while True:
            message = await call.read()
            _check_going_on(message)
            output = message.output
            if not (output.index == len(refs) < output.count <= MAX_PARTS):
                raise InvalidInput(f"its part {output.index} of {output.count} is out of order")
            ports.check(output.tensor)
            refs.append(output.tensor)
            if len(refs) == output.count:
                await self._owner.answered(self, output.step, refs)
                self._in_time()
                refs = []


class _EndedError(Exception):
    """The helper ended the session, for a reason of its own."""


def _check_going_on(message: Any) -> None:
    if message is EOF:
        raise _EndedError("it ended the session")
    if message.WhichOneof("kind") == "failed":
        raise _EndedError(message.failed.message)


def _opened(message: Any) -> node_pb2.AssistOpened:
    _check_going_on(message)
    if message.WhichOneof("kind") != "opened":
        raise InvalidInput("its first message is not AssistOpened")
    return message.opened


def _open_message(task: Task, share: Share, constants: Constants) -> node_pb2.AssistRequest:
    assign = task.assign
    message = node_pb2.AssistRequest()
    message.open.key.CopyFrom(task.key)
    message.open.helper.CopyFrom(share.helper)
    for name, value in constants.items():
        message.open.inputs[name].CopyFrom(value)
    message.open.loras.extend(assign.loras)
    message.open.numerics = assign.numerics
    message.open.protocol.CopyFrom(PROTOCOL)
    message.open.tenant, message.open.weight = task.tenant, task.weight
    message.open.priority = task.priority
    message.open.traceparent = assign.traceparent
    if assign.HasField("remaining_ms"):
        message.open.remaining_ms = assign.remaining_ms
    return message
