# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One image: its tasks are placed as their inputs come, and run again where they are lost.

An `ImageRun` is a state machine that is driven by plain calls: events of nodes, changes of the
fleet, timers. It owns no asyncio task, so ending it is a matter of `close`, and ten thousand of
them cost what their states cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kubediffusion import rpc
from kubediffusion.errors import (
    Internal,
    InvalidInput,
    KubeDiffusionError,
    NotFound,
    Unavailable,
)
from kubediffusion.gateway import helpers
from kubediffusion.gateway.attempts import Attempt, RunListener, TaskRun, TaskStatus
from kubediffusion.gateway.config import GatewayConfig
from kubediffusion.gateway.connections import NodeConnection
from kubediffusion.gateway.dispatch import assign_message, bytes_to_pull, placement_task
from kubediffusion.gateway.nodes import Fleet
from kubediffusion.gateway.placing import Placing, PlacingByQueue, Turn
from kubediffusion.gateway.plan import ImagePlan
from kubediffusion.gateway.timers import Timers
from kubediffusion.scheduling.placement import Placement
from kubediffusion.tensors import stored
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2


class ImageRun:
    def __init__(
        self,
        plan: ImagePlan,
        fleet: Fleet,
        config: GatewayConfig,
        listener: RunListener,
        placing: Placing | None = None,
    ) -> None:
        self.plan = plan
        self.closed = False
        self.tasks = {
            task.name: TaskRun(task, checkpoint=plan.checkpoints.get(task.name))
            for task in plan.tasks
        }
        self._fleet = fleet
        self._config = config
        self._listener = listener
        self._placing = placing or PlacingByQueue(fleet)
        self._readers: dict[str, list[TaskRun]] = {name: [] for name in self.tasks}
        for task in self.tasks.values():
            for producer in {source for source, _ in task.planned.ports.values()}:
                self._readers[producer].append(task)
        self._touched: dict[NodeConnection, None] = {}
        self._timers = Timers()
        self._waits = False
        # What the nodes have to say to the caller, in order, each thing once.
        self.warnings: dict[str, None] = {}

    @property
    def attempts_open(self) -> int:
        return sum(task.attempt is not None for task in self.tasks.values())

    def task_states(self) -> list[tuple[str, str, str]]:
        """(model, stage, state) of each task that is not done: held, queued or running."""
        if self.closed:
            return []
        models = [model for task in self.tasks.values() for model in task.planned.models]
        missing = set(self._fleet.missing(models))
        return [state for task in self.tasks.values() for state in task.states(missing)]

    @property
    def is_held(self) -> bool:
        """Whether it waits for a model that no node serves, rather than for its turn at one."""
        return self._waits and any(
            task.status is TaskStatus.HELD and self._fleet.missing(task.planned.models)
            for task in self.tasks.values()
        )

    @property
    def has_begun(self) -> bool:
        """Whether steps were done for it."""
        return any(
            task.step > 0 or task.checkpoint is not None or task.status is TaskStatus.DONE
            for task in self.tasks.values()
            if task.planned.steps
        )

    @property
    def is_running(self) -> bool:
        return any(
            task.attempt is not None and task.attempt.started for task in self.tasks.values()
        )

    def times(self) -> list[gateway_pb2.StageTime]:
        return [task.time for task in self.tasks.values() if task.time is not None]

    @property
    def request_id(self) -> str:
        return self.plan.request_id

    def handle(self, attempt: Attempt, kind: str, body: Any) -> None:
        _HANDLERS[kind](self, attempt, body)

    def start(self) -> None:
        for task in self.tasks.values():
            if not self.closed and not task.planned.ports:
                self._dispatch(task)

    def close(self) -> None:
        """Ends everything, everywhere: nothing of this image stays on any node."""
        if self.closed:
            return
        self.closed = True
        self._timers.cancel_all()
        self._stop_waiting()
        request_id = self.plan.request_id
        cancelled: set[NodeConnection] = set()
        for task in self.tasks.values():
            if (attempt := task.attempt) is not None:
                task.attempt = None
                if attempt.node not in cancelled:
                    cancelled.add(attempt.node)
                    attempt.node.cancel(request_id)
                attempt.node.forget(attempt)
                attempt.helpers.release()
        for node in self._touched:
            node.release(request_id)
        self._touched.clear()
        self._placing.touched(self)

    def shed(self, error: KubeDiffusionError) -> None:
        """The policy gave it up, for others' sake or because it cannot be on time any more."""
        self._fail(error)

    # ------------------------------------------------------------ placing

    def _dispatch(self, task: TaskRun) -> None:
        """Places a task, or whatever has to run before it, or holds it."""
        if self.closed or task.status in (TaskStatus.ASSIGNED, TaskStatus.DONE):
            return
        waited = task.epoch > 0 or task.status is TaskStatus.HELD
        task.status = TaskStatus.WAITING
        if not self._inputs_ready(task):
            return
        placement = self._placing.place(self, task)
        if isinstance(placement, Turn):
            task.status = TaskStatus.TURN
            self._placing.touched(self)
            return
        node = None if placement is None else self._fleet.connections.get(placement.address)
        if placement is not None and node is not None and placement.ready:
            self._assign(task, node, placement)
        elif (error := self._abandoned(task)) is None:
            self._hold(task)
        elif not self._may_end(error, waited) or not self._assign_leaving(task):
            self._fail(error)

    def _abandoned(self, task: TaskRun) -> KubeDiffusionError | None:
        planned = task.planned
        return self._fleet.abandoned(planned.template.workflow, planned.models)

    def _may_end(self, error: KubeDiffusionError, waited: bool) -> bool:
        """Whether it goes on though its models go. Who waits would do so for nothing; and who was
        served a revision that is gone is served the next one sooner."""
        deleted = isinstance(error, NotFound)
        return deleted and (self._listener.has_begun or not waited)

    def _assign_leaving(self, task: TaskRun) -> bool:
        """Whether a node that is going can have it."""
        found = self._fleet.place_leaving(placement_task(task, self.tasks))
        if found is None:
            return False
        self._assign(task, *found)
        return True

    @property
    def awaits_turn(self) -> bool:
        return any(task.status is TaskStatus.TURN for task in self.tasks.values())

    def take_turn(self) -> None:
        """Asks again where the tasks are to run whose turn had not come."""
        for task in self.tasks.values():
            if task.status is TaskStatus.TURN:
                self._dispatch(task)

    def _inputs_ready(self, task: TaskRun) -> bool:
        """Sends producers whose outputs went with their node to run again."""
        ready = True
        for name in dict.fromkeys(source for source, _ in task.planned.ports.values()):
            producer = self.tasks[name]
            kept_by = producer.kept_by
            gone = kept_by is not None and not self._fleet.holds(*kept_by)
            if producer.status is TaskStatus.DONE and gone:
                self._run_again(producer, "NodeLost")
            if producer.status is TaskStatus.WAITING:
                self._dispatch(producer)
            ready = ready and producer.status is TaskStatus.DONE
        return ready

    def _assign(self, task: TaskRun, node: NodeConnection, placement: Placement) -> None:
        task.epoch += 1
        task.attempts += 1
        now, every = self._fleet.now(), self._config.checkpoint_every
        chosen = self._placing.helpers(task, node)
        attempt = Attempt(self, task, node, placement, now, chosen)
        message = assign_message(self.plan, task, self.tasks, placement, every, now, chosen)
        task.status = TaskStatus.ASSIGNED
        task.attempt = attempt
        self._touched[node] = None
        node.assign(attempt, message, self._fleet.next_serial())

    # ------------------------------------------------------------ waiting for a node

    def _hold(self, task: TaskRun) -> None:
        task.status = TaskStatus.HELD
        if self._waits:
            return
        self._waits = True
        self._fleet.wait(self._retry_held)
        self._timers.after("hold", self.plan.activation_timeout, self._held_too_long)
        self._listener.held(self, self._fleet.missing(task.planned.models))

    def _retry_held(self) -> None:
        for task in self.tasks.values():
            if task.status is TaskStatus.HELD:
                self._dispatch(task)
        if not any(task.status is TaskStatus.HELD for task in self.tasks.values()):
            self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._waits:
            self._waits = False
            self._fleet.unwait(self._retry_held)
            self._timers.cancel("hold")

    def _held_too_long(self) -> None:
        task = next(t for t in self.tasks.values() if t.status is TaskStatus.HELD).planned
        missing = self._fleet.missing(task.models) or task.models
        whys = [why for model in missing if (why := self._fleet.why_missing(model))]
        self._fail(
            Unavailable(
                f"no model node took stage '{task.stage}', which needs {' and '.join(missing)}, "
                f"within {self.plan.activation_timeout:g} s"
                + (f" ({'; '.join(whys)})" if whys else "")
                + "; check `kubediffusion status`, or send the request again later",
                reason="NoReplica",
            )
        )

    # ------------------------------------------------------------ events of a node

    def _accepted(self, attempt: Attempt, body: node_pb2.Accepted) -> None:
        attempt.task.refused_since = None
        self._started(attempt)

    def _started(self, attempt: Attempt) -> None:
        if not attempt.started:
            attempt.started = True
            self._listener.started(self, attempt.task.planned.stage, attempt.node.node_id)

    def _progress(self, attempt: Attempt, body: node_pb2.Progress) -> None:
        self._started(attempt)
        attempt.task.step = body.step
        self._listener.stepped(self, body.step, body.total_steps)

    def _preview(self, attempt: Attempt, body: node_pb2.Preview) -> None:
        self._listener.previewed(self, body.step, body.image)

    def _checkpoint(self, attempt: Attempt, body: node_pb2.CheckpointTaken) -> None:
        self._keep_checkpoint(attempt.task, body.checkpoint)

    def _keep_checkpoint(self, task: TaskRun, checkpoint: node_pb2.Checkpoint) -> None:
        """One whose tensors lie on the node would be lost with it: those are of no use."""
        kept = all(tensor.HasField("inline") for tensor in checkpoint.tensors.values())
        if checkpoint.step and kept:
            task.checkpoint = checkpoint
            self._listener.checkpointed(self, task.planned.name, checkpoint)

    def _done(self, attempt: Attempt, body: node_pb2.Done) -> None:
        task, planned = attempt.task, attempt.task.planned
        missing = [port for port in planned.template.outputs if port not in body.outputs]
        if missing:
            self.task_lost(attempt, "Internal", f"output {missing[0]!r} is not in Done")
            return
        self._started(attempt)
        if task.step < planned.steps:  # nodes tell of the last step by its result
            self._listener.stepped(self, planned.steps, planned.steps)
        self._leave(attempt)
        task.status = TaskStatus.DONE
        task.outputs = body.outputs
        self.warnings.update(dict.fromkeys(body.warnings))
        task.checkpoint = None
        by_ref = any(stored(value) for value in body.outputs.values())
        task.kept_by = (attempt.node.address, attempt.node.incarnation) if by_ref else None
        self._measure(attempt, body.timing)
        if planned.name == self.plan.result[0]:
            self._listener.completed(self, body.outputs[self.plan.result[1]])
            return
        for reader in self._readers[planned.name]:
            if reader.status is TaskStatus.WAITING:
                self._dispatch(reader)

    def _measure(self, attempt: Attempt, timing: node_pb2.Timing) -> None:
        task, planned = attempt.task, attempt.task.planned
        units = planned.units
        if planned.steps and timing.steps_run and timing.steps_run != planned.steps:
            units *= timing.steps_run / planned.steps
        helpers.observe(self._fleet.profiles, planned, attempt.node.fingerprint, units, timing)
        # LoRAs are fetched in the same time, and from elsewhere.
        if timing.fetch_seconds and not planned.template.loras:
            pulled = bytes_to_pull(task, self.tasks)
            self._fleet.observe_transfer(attempt.node, pulled, timing.fetch_seconds)
        task.time = gateway_pb2.StageTime(
            index=self.plan.index,
            task=planned.name,
            stage=planned.stage,
            node=attempt.node.node_id,
            timing=timing,
            total_seconds=self._fleet.now() - attempt.since,
            attempts=task.attempts,
        )
        self._placing.ran(attempt, task.time)

    def _declined(self, attempt: Attempt, body: node_pb2.Declined) -> None:
        """Another node, now; a refusal that says nothing of the task is not held against it."""
        reason = body.reason
        attempt.node.declined(attempt.task.planned.model, reason)
        if reason == node_pb2.DECLINE_REASON_DRAINING and attempt.leaving and not attempt.started:
            # A node of an older version: it stays for nobody.
            attempt.task.failed_on |= {attempt.node.address}
        if reason in _ELSEWHERE:
            self._leave(attempt)
            attempt.task.attempts -= 1
            if reason == node_pb2.DECLINE_REASON_NOT_RESIDENT and self._refused_too_long(
                attempt.task, body.message
            ):
                return
            self._dispatch(attempt.task)
            return
        if reason == node_pb2.DECLINE_REASON_FINGERPRINT:
            attempt.task.checkpoint = None
        name = rpc.word_of(node_pb2.DeclineReason, reason, "DECLINE_REASON_")
        self.task_lost(attempt, "Declined", f"{name}: {body.message}")

    def _refused_too_long(self, task: TaskRun, why: str) -> bool:
        """Fails a task that no node will run though some have its model: their plan may never come
        to know what it needs, a LoRA, say."""
        now = self._fleet.now()
        if task.refused_since is None:
            task.refused_since = now
        if now - task.refused_since < self.plan.activation_timeout:
            return False
        self._fail(
            Unavailable(
                f"no model node took stage '{task.planned.stage}' within "
                f"{self.plan.activation_timeout:g} s ({why}); check `kubediffusion status`, or "
                "send the request again later",
                reason="NoReplica",
            )
        )
        return True

    def _yielded(self, attempt: Attempt, body: node_pb2.Yielded) -> None:
        """A node that drains, evicts the model or was asked to gave the lease back: nobody's
        failure."""
        task = attempt.task
        self._keep_checkpoint(task, body.checkpoint)
        self._leave(attempt)
        if not attempt.revoked and not attempt.node.leaving:
            attempt.node.declined(task.planned.model, node_pb2.DECLINE_REASON_NOT_RESIDENT)
        self._listener.resumed(self, task, "Revoked" if attempt.revoked else "Yielded")
        self._dispatch(task)

    def _failed(self, attempt: Attempt, body: node_pb2.Failed) -> None:
        if body.reason == node_pb2.FAILURE_REASON_INVALID_INPUT:
            self._leave(attempt)
            field = attempt.task.planned.field_of(body.field)
            self._fail(InvalidInput(body.message, field=field))
        elif body.reason == node_pb2.FAILURE_REASON_INPUT_LOST:
            self._input_lost(attempt, body)
        else:
            word = rpc.word_of(node_pb2.FailureReason, body.reason, "FAILURE_REASON_")
            helper = body.reason == node_pb2.FAILURE_REASON_HELPER_LOST
            if helper:
                attempt.task.failed_on |= attempt.helpers.addresses
            self.task_lost(attempt, word.title().replace("_", ""), body.message, blame=not helper)

    def _input_lost(self, attempt: Attempt, body: node_pb2.Failed) -> None:
        """The producers of what is gone run again, then this task; nobody's node is to blame."""
        task, lost = attempt.task, set(body.lost_tensors)
        producers = [
            producer
            for producer in (self.tasks[s] for s in dict(task.planned.ports.values()))
            if producer.kept_by is not None
        ]
        named = [
            producer
            for producer in producers
            if any(ref.id in lost for value in producer.outputs.values() for ref in stored(value))
        ]
        for producer in named or producers:
            self._run_again(producer, "InputLost")
        self.task_lost(attempt, "InputLost", body.message, blame=False)

    # ------------------------------------------------------------ losing and running again

    def result_lost(self, message: str) -> None:
        """The image could not be pulled from the node that made it."""
        task = self.tasks[self.plan.result[0]]
        self._run_again(task, "OutputLost", message)
        self._dispatch(task)

    def task_lost(self, attempt: Attempt, reason: str, message: str, *, blame: bool = True) -> None:
        task, retries = attempt.task, self._config.retries
        self._leave(attempt)
        if self.closed:
            return
        if blame:
            task.failed_on |= {attempt.node.address}
        task.failures += 1
        limit = retries.internal_attempts if reason in _OWN_FAULT else retries.attempts
        if task.failures >= limit:
            self._fail(self._given_up(task, reason, message))
            return
        self._listener.resumed(self, task, reason)
        if task.failures == 1:
            self._dispatch(task)
            return
        task.status = TaskStatus.BACKOFF
        delay = min(retries.backoff_first * 2 ** (task.failures - 2), retries.backoff_most)
        self._timers.after(task, delay, lambda: self._dispatch(task))

    def _run_again(self, producer: TaskRun, reason: str, message: str = "") -> None:
        """A task that was done becomes one to do, because its outputs are gone."""
        if producer.status is not TaskStatus.DONE:
            return
        producer.status = TaskStatus.WAITING
        producer.outputs, producer.kept_by = {}, None
        producer.failures += 1
        if producer.failures >= self._config.retries.attempts:
            self._fail(self._given_up(producer, reason, message or "its outputs were lost"))
            return
        self._listener.resumed(self, producer, reason)

    def _given_up(self, task: TaskRun, reason: str, message: str) -> KubeDiffusionError:
        text = (
            f"stage '{task.planned.stage}' (task {task.planned.name}) was tried "
            f"{task.failures} times, the last time: {message or reason}"
        )
        return Internal(text) if reason in _OWN_FAULT else Unavailable(text, reason="TaskLost")

    def _leave(self, attempt: Attempt) -> None:
        attempt.node.forget(attempt)
        attempt.helpers.release()
        attempt.task.attempt = None
        if attempt.task.status is TaskStatus.ASSIGNED:
            attempt.task.status = TaskStatus.WAITING
        self._placing.touched(self)

    def _fail(self, error: KubeDiffusionError) -> None:
        if not self.closed:
            self.close()
            self._listener.failed(self, error)


_HANDLERS: Mapping[str, Callable[[ImageRun, Attempt, Any], None]] = {
    "accepted": ImageRun._accepted,
    "declined": ImageRun._declined,
    "progress": ImageRun._progress,
    "preview": ImageRun._preview,
    "checkpoint": ImageRun._checkpoint,
    "done": ImageRun._done,
    "failed": ImageRun._failed,
    "yielded": ImageRun._yielded,
}

# Refusals that say something of the node and nothing of the task.
_ELSEWHERE = frozenset(
    {
        node_pb2.DECLINE_REASON_DRAINING,
        node_pb2.DECLINE_REASON_NOT_RESIDENT,
        node_pb2.DECLINE_REASON_QUEUE_FULL,
    }
)
_OWN_FAULT = frozenset({"Internal", "OutOfMemory", "Unspecified"})
