# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One model node as its coordinator sees it: one Work stream, kept up for ever.

Messages down go through a queue (grpc.aio allows one writer a stream), events up are handed to the
assignment they belong to by a plain call. When the stream breaks, every assignment on it is told at
once; the stream is then opened again with a bounded back-off.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import grpc.aio

from kubediffusion import rpc
from kubediffusion.gateway.config import NodeLimits
from kubediffusion.gateway.fullness import PAUSE, Fullness
from kubediffusion.gateway.outbox import Outbox
from kubediffusion.gateway.timers import Timers
from kubediffusion.scheduling.fleet import NodeState
from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc

log = logging.getLogger(__name__)

PROTOCOL = node_pb2.ProtocolRange(min=1, max=1)
_COMING = frozenset(
    {
        node_pb2.MODEL_STATE_PENDING,
        node_pb2.MODEL_STATE_DOWNLOADING,
        node_pb2.MODEL_STATE_LOADING,
    }
)


class Assignment(Protocol):
    """A task on a node: what a connection must know of it."""

    request_id: str
    task_name: str
    epoch: int
    expected_seconds: float

    def handle(self, kind: str, body: Any) -> None:
        """An event of this task at this epoch."""

    def lost(self, message: str) -> None:
        """The node, or the way to it, is gone."""


class FleetListener(Protocol):
    # Models that nodes are told with each renewal to stay for.
    needed: frozenset[str]

    def described(self, connection: NodeConnection, models: list[node_pb2.ModelStatus]) -> None:
        """A node told of its models."""

    def changed(self) -> None:
        """Some task that could not be placed may now be."""

    def room(self, connection: NodeConnection) -> None:
        """A node that was full may take a task."""


class NodeConnection:
    def __init__(
        self,
        address: str,
        gateway_id: str,
        limits: NodeLimits,
        listener: FleetListener,
        now: Callable[[], float],
    ) -> None:
        self.address = address
        self.last_placed = 0
        self._helping = 0
        self.description: node_pb2.DescribeResponse | None = None
        self.retiring = False
        self._full = Fullness()
        self._limits = limits
        self._listener = listener
        self._now = now
        self._hello = node_pb2.WorkRequest(
            hello=node_pb2.Hello(
                gateway_id=gateway_id, protocol=PROTOCOL, lease_seconds=limits.lease
            )
        )
        self._up = False
        self._last_heard = 0.0
        self.load = node_pb2.LoadReport()
        self.reported_at = 0.0
        self._ready: frozenset[str] = frozenset()
        self._loading: dict[str, float] = {}
        self._draining = False
        self._assigned: dict[tuple[str, str], Assignment] = {}
        self._expected = 0.0
        # Of that, what was sent since the last report.
        self._sent = 0.0
        self._outbox = Outbox()
        self._timers = Timers()
        self._call: Any = None
        self._stub: node_pb2_grpc.ModelNodeStub | None = None
        self._state: NodeState | None = None
        self._task: asyncio.Task[None] | None = None
        self._describing: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ what others ask

    @property
    def state(self) -> NodeState | None:
        """None while there is no stream."""
        if not self._up:
            return None
        if self._state is None:
            self._state = self._build_state()
        return self._state

    @property
    def leaving(self) -> bool:
        """It takes only what has no other place."""
        return self._draining or self.retiring

    @property
    def node_id(self) -> str:
        return self.description.node_id if self.description is not None else self.address

    @property
    def incarnation(self) -> str:
        return self.description.incarnation if self._up and self.description is not None else ""

    @property
    def host_id(self) -> str:
        return self.description.host_id if self.description is not None else ""

    @property
    def fingerprint(self) -> str:
        return self.description.fingerprint if self.description is not None else ""

    @property
    def helping(self) -> int:
        """Leases on other nodes that were told to be helped there; its reports say so later."""
        return self._helping

    @helping.setter
    def helping(self, leases: int) -> None:
        self._helping = leases
        self._state = None

    @property
    def assigned(self) -> int:
        return len(self._assigned)

    @property
    def expected_seconds(self) -> float:
        """All that we have there, as it was expected to take from its beginning."""
        return self._expected

    @property
    def pending_releases(self) -> int:
        return self._outbox.pending_releases

    def _build_state(self) -> NodeState:
        node, load = self.description, self.load
        assert node is not None
        return NodeState(
            address=self.address,
            node_id=node.node_id,
            incarnation=node.incarnation,
            host_id=node.host_id,
            fingerprint=node.fingerprint,
            ready=self._ready,
            loading=self._loading,
            queued=load.queued,
            running=load.running,
            # A report is up to 100 ms old; what we sent since then is not in it. With other
            # gateways there, what it holds beside that is not ours.
            queue_seconds=max(
                load.queued_seconds + (self._sent if load.gateways > 1 else 0.0), self._expected
            ),
            memory_used=load.memory_used,
            memory_limit=load.memory_limit,
            draining=self.leaving,
            suspect=self._now() - self._last_heard > self._limits.suspect,
            full_until=self._full.until,
            last_placed=self.last_placed,
            gateways=load.gateways,
            helping=max(load.helping, self.helping),
        )

    # ------------------------------------------------------------ what the coordinator does

    def assign(self, assignment: Assignment, message: node_pb2.WorkRequest, serial: int) -> None:
        key = (assignment.request_id, assignment.task_name)
        self._assigned[key] = assignment
        self._full.sent(key)
        self._expected += assignment.expected_seconds
        self._sent += assignment.expected_seconds
        self.last_placed = serial
        self._state = None
        self._outbox.send(message)

    def forget(self, assignment: Assignment) -> None:
        """The assignment is over, or no longer of interest: its events are dropped from now on."""
        key = (assignment.request_id, assignment.task_name)
        if self._assigned.get(key) is assignment:
            del self._assigned[key]
            self._expected -= assignment.expected_seconds
            if not self._assigned:
                self._expected = 0.0  # no rounding error stays behind
                if self.retiring:
                    self._end_soon()
            self._state = None
            if self._full.known and self._full.withdrawn(key):
                # Not from within: whoever gives it up is not done with that.
                self._timers.after("room", 0.0, self._room)

    def yield_lease(self, assignment: Assignment) -> None:
        """The lease is to come back at its next step boundary, with a checkpoint."""
        message = node_pb2.WorkRequest()
        key = getattr(message, "yield").key
        key.request_id, key.task = assignment.request_id, assignment.task_name
        key.epoch = assignment.epoch
        self._outbox.send(message)

    def cancel(self, request_id: str) -> None:
        if self._up:
            self._outbox.send(node_pb2.WorkRequest(cancel=node_pb2.Cancel(request_id=request_id)))

    def renew(self) -> None:
        """We live, and will come back for these; nothing is sent while there is no stream."""
        renew = node_pb2.Renew(needed_models=sorted(self._listener.needed))
        self._outbox.send(node_pb2.WorkRequest(renew=renew))

    def release(self, request_id: str) -> None:
        """Free what a request left there: told now or, while the node is away, on its return."""
        self._outbox.release(request_id)

    def declined(self, model: str, reason: node_pb2.DeclineReason) -> None:
        """What a refusal tells about the node, until it reports again."""
        if reason == node_pb2.DECLINE_REASON_DRAINING:
            self._draining = True
        elif reason == node_pb2.DECLINE_REASON_NOT_RESIDENT:
            self._ready -= {model}
            self._describe_soon()
        elif reason == node_pb2.DECLINE_REASON_QUEUE_FULL:
            self._full.refused(self._now(), self.load.queued + self.load.running)
            self._timers.after("full", PAUSE, self._rested)
        self._state = None

    def _rested(self) -> None:
        self._full.rested()
        self._room()

    def _room(self) -> None:
        self._state = None
        self._listener.room(self)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"node {self.address}")

    def retire(self) -> None:
        """No new tasks. The connection ends with the node, or a lease after its last task: until
        then others may pull what was made there, and it is told what nobody needs any more."""
        self.retiring = True
        self._state = None
        if self._up:
            if not self._assigned:
                self._end_soon()
        elif self._task is not None:
            self._task.cancel()

    def revive(self) -> bool:
        """It is to be used again; whether it can be."""
        if not self._up:
            return False
        self.retiring = False
        self._state = None
        self._timers.cancel("retired")
        return True

    def _end_soon(self) -> None:
        self._timers.after("retired", self._limits.lease, self._end)

    def _end(self) -> None:
        """Not while a request is there, or will still come for what it has."""
        if self._assigned or self._listener.needed & self._ready:
            self._end_soon()
        else:
            self._break_stream()

    async def stop(self) -> None:
        await self._outbox.drained(1.0)
        tasks = [task for task in (self._task, self._describing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def ended(self) -> bool:
        return self._task is not None and self._task.done()

    # ------------------------------------------------------------ the stream

    async def _run(self) -> None:
        delay = self._limits.reconnect_first
        channel = rpc.connect(self.address)
        try:
            while not self.retiring:
                welcomed, why = await self._session(channel)
                if self.retiring:
                    break
                delay = (
                    self._limits.reconnect_first
                    if welcomed
                    else min(delay * 2, self._limits.reconnect_most)
                )
                log.debug("node %s: %s; again in %.2f s", self.address, why, delay)
                await asyncio.sleep(delay)
        finally:
            await channel.close()

    async def _session(self, channel: grpc.aio.Channel) -> tuple[bool, str]:
        """One stream, from its opening to its end: whether we were welcome, and why it ended."""
        stub = node_pb2_grpc.ModelNodeStub(channel)
        call: Any = stub.Work()
        self._call = call
        writer: asyncio.Task[None] | None = None
        why = "the node ended the stream"
        welcomed = False
        try:
            async with asyncio.timeout(self._limits.welcome):
                await call.write(self._hello)
                events = aiter(call)
                first = await anext(events, None)
            if first is None or first.WhichOneof("kind") != "welcome":
                return False, "no Welcome as the first message"
            welcomed = True
            self._open(first.welcome, stub)
            writer = asyncio.create_task(
                self._outbox.write_to(call), name=f"to node {self.address}"
            )
            async for event in events:
                self._receive(event)
        except grpc.aio.AioRpcError as error:
            why = error.details() or error.code().name
        except (TimeoutError, asyncio.InvalidStateError) as error:
            why = str(error) or "no Welcome in time"
        except asyncio.CancelledError:
            # grpc.aio raises this where the call was cancelled, too, by `_break_stream`.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            why = "silent for too long"
        finally:
            self._call = None
            call.cancel()
            if writer is not None:
                writer.cancel()
            self._close(why)
        return welcomed, why

    def _open(self, welcome: node_pb2.Welcome, stub: node_pb2_grpc.ModelNodeStub) -> None:
        self._stub = stub
        self._up = True
        self._last_heard = self._now()
        self._draining = False
        self._full.clear()
        self._expected = 0.0
        self._outbox.open()
        if self._listener.needed:
            self.renew()
        self._set_description(welcome.node)
        if welcome.node.HasField("load"):
            self._set_load(welcome.node.load)
        self._timers.every("renew", self._limits.lease / 3, self.renew)
        self._timers.every("silence", min(1.0, self._limits.suspect / 2), self._check_silence)
        self._listener.changed()

    def _close(self, why: str) -> None:
        was_up, self._up = self._up, False
        self._state = None
        self._outbox.close()
        self._timers.cancel_all()
        if self._describing is not None:
            self._describing.cancel()
        lost, self._assigned = list(self._assigned.values()), {}
        self._expected = 0.0
        for assignment in lost:
            assignment.lost(f"node {self.node_id} is gone: {why}")
        if was_up:
            self._listener.changed()

    def _break_stream(self) -> None:
        if self._call is not None:
            self._call.cancel()

    # ------------------------------------------------------------ events

    def _receive(self, event: node_pb2.WorkEvent) -> None:
        self._last_heard = self._now()
        kind = event.WhichOneof("kind")
        if kind is None or kind == "welcome":
            return
        body = getattr(event, kind)
        if kind == "load":
            self._loaded(body)
            return
        key = body.key
        assignment = self._assigned.get((key.request_id, key.task))
        if assignment is None or assignment.epoch != key.epoch:
            return  # of an attempt that was given up: a late node can do no harm
        took = self._full.known and kind != "declined"
        if took and self._full.taken((key.request_id, key.task)):
            self._room()
        try:
            assignment.handle(kind, body)
        except Exception:
            log.exception("an event of node %s could not be handled", self.address)
            self.forget(assignment)
            assignment.lost("the gateway could not handle an event; see its log")

    def _loaded(self, load: node_pb2.LoadReport) -> None:
        before = (self._ready, self._draining, self.load.residency_generation)
        self._set_load(load)
        if before != (self._ready, self._draining, load.residency_generation):
            self._describe_soon()
            self._listener.changed()
        elif self._loading:
            self._describe_soon()
        if self._full.reported(load.queued + load.running):
            self._room()

    def _set_load(self, load: node_pb2.LoadReport) -> None:
        self.load = load
        self.reported_at = self._now()
        self._sent = 0.0
        self._draining = load.draining
        ready = frozenset(load.resident)
        if ready != self._ready:
            self._ready = ready
            self._loading = {k: v for k, v in self._loading.items() if k not in ready}
        self._state = None

    def _set_description(self, node: node_pb2.DescribeResponse) -> None:
        self.description = node
        now = self._now()
        self._ready = frozenset(
            model.identity for model in node.models if model.state == node_pb2.MODEL_STATE_READY
        )
        self._loading = {
            model.identity: self._loading.get(model.identity, now)
            for model in node.models
            if model.state in _COMING
        }
        self._state = None
        self._listener.described(self, list(node.models))

    def _describe_soon(self) -> None:
        if self._up and (self._describing is None or self._describing.done()):
            self._describing = asyncio.create_task(self._describe())

    async def _describe(self) -> None:
        assert self._stub is not None, "only while a stream is open"
        try:
            node = await self._stub.Describe(node_pb2.DescribeRequest(), timeout=5.0)
        except grpc.aio.AioRpcError as error:
            log.debug("node %s: Describe: %s", self.address, error.details())
            return
        if self._up:
            self._set_description(node)
            self._listener.changed()

    # ------------------------------------------------------------ timers

    def _check_silence(self) -> None:
        self._state = None  # `suspect` depends on the time
        if self._now() - self._last_heard > self._limits.dead:
            self._break_stream()
