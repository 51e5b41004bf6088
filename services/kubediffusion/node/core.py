# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The node on its event loop: what gateways ask for becomes tasks, what happens becomes events."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence

from kubediffusion.errors import InvalidInput, KubeDiffusionError, TensorLost, Unavailable
from kubediffusion.models.base import PortValue
from kubediffusion.node.admission import Admission, RefusedError, is_begun
from kubediffusion.node.assisting import Assisting
from kubediffusion.node.device import Device, Outputs
from kubediffusion.node.failures import FailureReason, failure_of
from kubediffusion.node.helping import Helpers
from kubediffusion.node.inputs import Inputs
from kubediffusion.node.report import Reporter
from kubediffusion.node.residency import Residency
from kubediffusion.node.session import Session
from kubediffusion.node.sharing import Constants, Share
from kubediffusion.node.tasks import Name, Resident, Stop, Task
from kubediffusion.telemetry.metrics import Children, NodeMetrics
from kubediffusion.tensors import TensorStore, stored
from kubediffusion.v1alpha1 import node_pb2, tensor_pb2

MAX_PRIORITY = 1000

log = logging.getLogger(__name__)


class Node:
    """All methods are for the event loop's thread. The device's listener."""

    def __init__(
        self,
        describe: Callable[[], node_pb2.DescribeResponse],
        *,
        store: TensorStore,
        device: Device,
        inputs: Inputs,
        residency: Residency,
        metrics: NodeMetrics,
        max_tasks: int,
        now: Callable[[], float],
        on_drain: Callable[[], None],
        on_poisoned: Callable[[str], None],
    ) -> None:
        self.draining = False
        self.sessions: dict[str, Session] = {}
        self.tasks: dict[Name, Task] = {}
        self._describe = describe
        self._store = store
        self._device = device
        self._inputs = inputs
        self._residency = residency
        self._metrics = metrics
        self._child = Children()
        self._now = now
        self._on_drain = on_drain
        self._on_poisoned = on_poisoned
        self._sequence = itertools.count()
        self._admission = Admission(residency, inputs, store, device.fingerprint, max_tasks)
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._freed = asyncio.Event()
        self.reporter = Reporter(self, store, device, residency, metrics, now)
        # Helpers of the leases that are here, and what this node helps.
        self.assisting = Assisting(device, inputs, store, metrics)
        self.helpers = Helpers(self, residency, inputs, store, metrics, device.fingerprint, now)
        residency.on_evicting = self._evicting

    # ------------------------------------------------------------ gateways

    def open(self, session: Session, protocol: int) -> None:
        old = self.sessions.get(session.gateway_id)
        if old is not None:
            # It reconnected before we noticed that its former stream had broken.
            self.close(old, Unavailable("the gateway opened another stream", reason="Superseded"))
        self.sessions[session.gateway_id] = session
        self._store.touch(session.gateway_id, session.lease_seconds)
        welcome = node_pb2.Welcome(node=self._describe(), protocol=protocol)
        session.outbox.send(node_pb2.WorkEvent(welcome=welcome))
        self._metrics.gateways.set(len(self.sessions))

    def close(self, session: Session, error: KubeDiffusionError | None = None) -> None:
        """The stream is over. Its tasks stop, for the coordinator gives them to another node;
        its tensors stay until the gateway's lease lapses, for it may come back for them."""
        session.close(error)
        if self.sessions.get(session.gateway_id) is session:
            del self.sessions[session.gateway_id]
            self._metrics.gateways.set(len(self.sessions))
        for task in [task for task in self.tasks.values() if task.session is session]:
            self._stop(task, Stop.CANCEL)

    def receive(self, session: Session, message: node_pb2.WorkRequest) -> None:
        self._store.touch(session.gateway_id)
        kind = message.WhichOneof("kind")
        if kind == "assign":
            self.assign(session, message.assign)
        elif kind == "release":
            self._store.release(session.gateway_id, message.release.request_ids)
            self._freed.set()
            self.reporter.changed()
        elif kind == "renew":
            self._residency.needs.set(session.gateway_id, message.renew.needed_models)
            self._freed.set()
        elif kind == "cancel":
            self._cancel(session, message.cancel.request_id)
        elif kind == "yield":
            key = getattr(message, "yield").key
            task = self.tasks.get((key.request_id, key.task))
            if task is not None and task.session is session and task.key.epoch == key.epoch:
                self._stop(task, Stop.YIELD)
        elif kind == "drain":
            self._on_drain()
        elif kind == "hello":
            raise InvalidInput("Hello is only a stream's first message", field="hello")
        # Kinds that we do not know are of a later protocol.

    def tick(self) -> None:
        """Once a second: gateways that have been silent for too long lose what they left here."""
        for gateway_id in self._store.expire():
            self._residency.needs.set(gateway_id, ())
            session = self.sessions.get(gateway_id)
            if session is not None:
                self.close(session, Unavailable("silent beyond its lease", reason="LeaseLapsed"))
        self._freed.set()
        self._inputs.trim()

    # ------------------------------------------------------------ taking tasks

    def assign(self, session: Session, assign: node_pb2.Assign) -> None:
        try:
            task = self._admit(session, assign)
        except RefusedError as refused:
            reason = node_pb2.DeclineReason.Name(refused.reason)
            self._metrics.tasks_declined.labels(reason.removeprefix("DECLINE_REASON_")).inc()
            declined = node_pb2.Declined(
                key=assign.key, reason=refused.reason, message=refused.message
            )
            session.outbox.send(node_pb2.WorkEvent(declined=declined))
        except InvalidInput as error:
            reason = node_pb2.FAILURE_REASON_INVALID_INPUT
            session.outbox.send(_failed(assign.key, reason, error))
        else:
            session.outbox.send(node_pb2.WorkEvent(accepted=node_pb2.Accepted(key=assign.key)))
            if task is not None:
                self._begin(task)

    def _admit(self, session: Session, assign: node_pb2.Assign) -> Task | None:
        """The task, entered everywhere; None where it is here already. Raises."""
        name = (assign.key.request_id, assign.key.task)
        present = self.tasks.get(name)
        mine = present is not None and present.session is session
        if mine and present is not None and present.key.epoch == assign.key.epoch:
            return None
        resident, helpers, loras = self._admission.examine(
            assign,
            draining=self.draining
            and not self._residency.needs.has(session.gateway_id, assign.model),
            tasks=len(self.tasks),
            present=present.key.epoch if present is not None else None,
        )
        if present is not None:
            self._stop(present, Stop.CANCEL)
            self._forget(present)
        task = self.make(session, assign, resident, helpers, loras)
        self._enter(task)
        self.helpers.give_way()
        return task

    def submit(self, task: Task) -> None:
        """A part of another node's lease: nothing has to be fetched for it."""
        self._enter(task)
        self.reporter.changed()
        self._device.submit(task)

    def withdraw(self, task: Task) -> None:
        """What `submit` took is no longer wanted."""
        self._stop(task, Stop.CANCEL)

    def _enter(self, task: Task) -> None:
        self._store.admit(task.scope)
        self.tasks[task.name] = task
        self._quiet.clear()
        for resident in task.residents:
            resident.enter(task)

    def make(
        self,
        session: Session,
        assign: node_pb2.Assign,
        resident: Resident,
        helpers: Sequence[Resident | None] = (),
        loras: Sequence[node_pb2.LoraUse] = (),
        call: Callable[[], Mapping[str, PortValue]] | None = None,
    ) -> Task:
        now = self._now()
        if assign.lease.HasField("resume") and not is_begun(assign.lease.resume):
            assign.lease.ClearField("resume")
        return Task(
            assign=assign,
            session=session,
            resident=resident,
            helpers=helpers,
            call=call,
            sequence=next(self._sequence),
            arrival=now,
            deadline=now + assign.remaining_ms / 1000 if assign.HasField("remaining_ms") else None,
            weight=assign.weight if 0 < assign.weight < math.inf else 1.0,
            priority=max(-MAX_PRIORITY, min(MAX_PRIORITY, assign.priority)),
            exact=assign.numerics != node_pb2.NUMERICS_FAST,
            loras_declared=loras,
        )

    def _begin(self, task: Task) -> None:
        self.reporter.changed()
        if self._inputs.at_hand(task):
            self._device.submit(task)
        else:
            task.fetching = asyncio.create_task(self._fetch(task), name=f"inputs of {task.name}")

    async def _fetch(self, task: Task) -> None:
        try:
            await self._inputs.gather(task)
        except TensorLost as error:
            self.failed(task, error, node_pb2.FAILURE_REASON_INPUT_LOST)
        except Exception as error:
            known, reason = failure_of(error)
            if reason == node_pb2.FAILURE_REASON_INTERNAL:
                log.error("inputs of %s", task.name, exc_info=error)
            self.failed(task, known, reason)
        else:
            task.fetching = None
            if not task.ended:
                self._device.submit(task)

    # ------------------------------------------------------------ stopping tasks

    def _cancel(self, session: Session, request_id: str) -> None:
        for task in [t for t in self.tasks.values() if t.name[0] == request_id]:
            if task.session is session:
                self._stop(task, Stop.CANCEL)

    def _stop(self, task: Task, stop: Stop) -> None:
        if task.stop is Stop.CANCEL or task.ended:
            return
        task.stop = stop
        if task.fetching is None:
            self._device.stop(task)
        elif task.is_lease or stop is Stop.CANCEL:
            task.fetching.cancel()
            self.stopped(task, None)

    def _stop_all(self, tasks: Sequence[Task], stop: Stop) -> None:
        """At once: the room that the first one leaves is not for the next to begin in."""
        for task in tasks:
            if task.stop is None:
                task.stop = stop
        for task in tasks:
            self._stop(task, stop)

    def _evicting(self, resident: Resident) -> None:
        self._stop_all(list(resident.tasks), Stop.EVICT)
        self.helpers.end("the model is being evicted", resident)
        self.reporter.count_measures(resident)

    async def drain(self) -> None:
        """Gives the leases back, and returns when no task is left. From now on it takes only tasks
        of models that their gateway needs, because nobody else has them."""
        self.draining = True
        self._metrics.draining.set(1)
        self.reporter.now()
        self._stop_all(list(self.tasks.values()), Stop.DRAIN)
        self.helpers.end("the node is draining")
        await self._quiet.wait()

    async def forsaken(self) -> None:
        """Returns when nobody needs anything here any more: no task, no tensor, no model."""
        while self.tasks or self._store.stats().tensors or self._residency.needed:
            self._freed.clear()
            await self._freed.wait()

    # ------------------------------------------------------------ what the device tells

    def progressed(self, task: Task, step: int, total_steps: int, seconds: float) -> None:
        if task.ended:
            return
        self.reporter.count_steps(task)
        progress = node_pb2.Progress(
            key=task.key, step=step, total_steps=total_steps, seconds=seconds
        )
        task.session.outbox.replace(("progress", *task.name), node_pb2.WorkEvent(progress=progress))

    def previewed(self, task: Task, step: int, image: tensor_pb2.TensorRef) -> None:
        if not task.ended:
            self._metrics.previews.labels(task.model).inc()
            preview = node_pb2.Preview(key=task.key, step=step, image=image)
            task.session.outbox.replace(
                ("preview", *task.name), node_pb2.WorkEvent(preview=preview)
            )

    def checkpointed(self, task: Task, checkpoint: node_pb2.Checkpoint) -> None:
        if not task.ended:
            self._metrics.checkpoints.labels(task.model).inc()
            taken = node_pb2.CheckpointTaken(key=task.key, checkpoint=checkpoint)
            task.session.outbox.replace(
                ("checkpoint", *task.name), node_pb2.WorkEvent(checkpoint=taken)
            )

    def done(self, task: Task, outputs: Outputs) -> None:
        if task.ended or task.stop is Stop.CANCEL:
            # Nobody will release what a task left that is over; its gateway never hears of it.
            for value in outputs.values():
                for ref in stored(value):
                    self._store.discard(ref.id)
            self.stopped(task, None)
            return
        self._ended(task, "done")
        done = node_pb2.Done(key=task.key, outputs=outputs, timing=task.timing())
        done.warnings.extend(task.warnings)
        task.session.outbox.send(node_pb2.WorkEvent(done=done))

    def failed(self, task: Task, error: KubeDiffusionError, reason: FailureReason) -> None:
        if task.ended:
            return
        self._ended(task, "failed", error.message)
        word = node_pb2.FailureReason.Name(reason).removeprefix("FAILURE_REASON_")
        self._metrics.failures.labels(task.model, task.stage, word).inc()
        task.session.outbox.send(_failed(task.key, reason, error))

    def stopped(self, task: Task, checkpoint: node_pb2.Checkpoint | None) -> None:
        """Ended before it was done. A lease that had not begun is declined, so that the
        coordinator goes on from what it has."""
        if task.ended:
            return
        stop = task.stop
        self._ended(task, "cancelled" if stop is Stop.CANCEL or stop is None else "yielded")
        if stop is Stop.CANCEL or stop is None:
            error = Unavailable("cancelled")
            event = _failed(task.key, node_pb2.FAILURE_REASON_CANCELLED, error)
        elif checkpoint is None and stop is not Stop.YIELD:
            draining = stop is Stop.DRAIN
            declined = node_pb2.Declined(
                key=task.key,
                reason=node_pb2.DECLINE_REASON_DRAINING
                if draining
                else node_pb2.DECLINE_REASON_NOT_RESIDENT,
                message="the node is draining" if draining else "the model is being evicted",
            )
            event = node_pb2.WorkEvent(declined=declined)
        else:
            self._metrics.leases_yielded.labels(task.model).inc()
            if checkpoint is None and task.assign.lease.HasField("resume"):
                checkpoint = task.assign.lease.resume
            yielded = node_pb2.Yielded(key=task.key, checkpoint=checkpoint)
            event = node_pb2.WorkEvent(yielded=yielded)
        task.session.outbox.send(event)

    def batched(self, tasks: Sequence[Task]) -> None:
        first = tasks[0].assign
        self._metrics.batch_size.labels(first.model, first.stage).observe(len(tasks))

    def preempted(self, task: Task) -> None:
        self._metrics.leases_preempted.labels(task.model).inc()

    def sharing(self, task: Task, share: Share, constants: Constants) -> None:
        self.assisting.begin(task, share, constants)

    def asking(self, task: Task, share: Share, step: node_pb2.AssistStep) -> None:
        self.assisting.ask(share, step)

    def poisoned(self, message: str) -> None:
        self._on_poisoned(message)

    def _ended(self, task: Task, outcome: str, error: str = "") -> None:
        """Out of every table; whoever tells the gateway does so after this."""
        self.reporter.observe(task, outcome, error)
        self._forget(task)

    def _forget(self, task: Task) -> None:
        task.ended = True
        if self.tasks.get(task.name) is task:
            del self.tasks[task.name]
        for resident in task.residents:
            resident.leave(task)
        self.assisting.end(task)
        if not self.tasks:
            self._quiet.set()
            self._freed.set()
        self.reporter.changed()


def _failed(
    key: node_pb2.TaskKey, reason: node_pb2.FailureReason, error: KubeDiffusionError
) -> node_pb2.WorkEvent:
    failed = node_pb2.Failed(key=key, reason=reason, message=error.message, field=error.field)
    if isinstance(error, TensorLost):
        failed.lost_tensors.extend(error.tensor_ids)
    return node_pb2.WorkEvent(failed=failed)
