# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The one thread that owns the device.

It takes what can run from its inbox, asks `scheduling.order` what to do next, does one one-shot
task or one step of a batch of leases, tells the loop, and looks again. So everything that changes
a task (a more urgent one, a cancellation, a load or an eviction) happens between two steps.

Loading runs here too, not beside: diffusers and transformers set process-wide defaults (the default
dtype, patched module constructors) while they build a network, and a step of another model at that
moment would compute with them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any, Protocol, TypeVar

import torch

from kubediffusion.errors import Cancelled, Internal, InvalidInput, KubeDiffusionError
from kubediffusion.models.base import CheckpointState, PortValue
from kubediffusion.node import ports
from kubediffusion.node.failures import FailureReason, failure_of, is_poisoned
from kubediffusion.node.sharing import Constants, Share, StepSharing
from kubediffusion.node.tasks import Stop, Task
from kubediffusion.scheduling.order import FairShare, Limits, next_batch
from kubediffusion.tensors import TensorStore
from kubediffusion.v1alpha1 import node_pb2, tensor_pb2

# Progress of a lease, at most so often: every word of it takes the interpreter from the device.
TELL_SECONDS = 0.1

T = TypeVar("T")
Outputs = dict[str, tensor_pb2.Value]

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who is told, on the event loop, what happened on the device."""

    def progressed(self, task: Task, step: int, total_steps: int, seconds: float) -> None: ...
    def previewed(self, task: Task, step: int, image: tensor_pb2.TensorRef) -> None: ...
    def checkpointed(self, task: Task, checkpoint: node_pb2.Checkpoint) -> None: ...
    def done(self, task: Task, outputs: Outputs) -> None: ...
    def failed(self, task: Task, error: KubeDiffusionError, reason: FailureReason) -> None: ...
    def stopped(self, task: Task, checkpoint: node_pb2.Checkpoint | None) -> None: ...
    def batched(self, tasks: Sequence[Task]) -> None: ...
    def preempted(self, task: Task) -> None: ...
    def poisoned(self, message: str) -> None: ...

    def sharing(self, task: Task, share: Share, constants: Constants) -> None:
        """A lease has begun that a helper elsewhere computes a part of."""

    def asking(self, task: Task, share: Share, step: node_pb2.AssistStep) -> None:
        """The helper is to compute this step's part; then `Device.answered`."""


class Device:
    """Its methods are for the event loop; what they ask for happens at the next boundary."""

    def __init__(
        self,
        store: TensorStore,
        fingerprint: str,
        *,
        threads: int = 1,
        limits: Limits | None = None,
        now: Callable[[], float],
    ) -> None:
        self.fingerprint = fingerprint
        # Tasks that have the device now; read by the loop.
        self.running: tuple[Task, ...] = ()
        self._store = store
        self._threads = threads
        self._limits = limits or Limits()
        self._now = now
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._ready: dict[int, Task] = {}
        self._fair = FairShare()
        self._sharing = StepSharing(store, self._tell_sharing, self._tell_asking)
        self._posts: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._armed = False
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="device", daemon=True)

    def start(self, listener: Listener) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs, as it does from `start` to `close` unless something broke."""
        return self._thread.is_alive() and not self._closing

    def submit(self, task: Task) -> None:
        self._inbox.put(lambda: self._take(task))

    def stop(self, task: Task) -> None:
        """Ends a submitted task at the next boundary as `task.stop` says."""
        self._inbox.put(lambda: self._stop(task))

    def joined(self, task: Task, share: Share) -> None:
        """The helper is there: from the lease's next step on."""
        self._hear_soon(task, share, lambda: self._sharing.joined(task, share))

    def answered(
        self,
        task: Task,
        share: Share,
        step: int,
        refs: Sequence[tensor_pb2.TensorRef],
        fetched: ports.Arrays,
    ) -> None:
        """The helper's part of that step."""
        answered = partial(self._sharing.answered, task, share, step, refs, fetched)
        self._hear_soon(task, share, answered)

    def left(self, task: Task, share: Share, why: KubeDiffusionError) -> None:
        """The helper is lost: the lease goes on without it, if it can."""
        self._hear_soon(task, share, lambda: self._sharing.left(task, share, why))

    def _hear_soon(self, task: Task, share: Share, what: Callable[[], None]) -> None:
        self._inbox.put(lambda: self._hear(task, share, what))

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Runs `function` on the device thread between two steps."""
        future: asyncio.Future[T] = self._loop.create_future()

        def settle(outcome: Callable[[], None]) -> None:
            if not future.done():
                outcome()

        def run() -> None:
            try:
                outcome = partial(future.set_result, function())
            except BaseException as error:
                outcome = partial(future.set_exception, error)
            self._post(settle, outcome)

        self._inbox.put(run)
        return future

    def close(self, timeout: float = 5.0) -> bool:
        """Ends the thread after what it does now; whether it ended in time."""
        self._closing = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # ------------------------------------------------------------ the thread

    def _main(self) -> None:
        # Both are this thread's own: OpenMP keeps its team's size by thread.
        torch.set_num_threads(self._threads)
        torch.set_grad_enabled(False)
        try:
            while not self._closing:
                self._receive()
                if not self._closing:
                    self._turn()
        except BaseException as error:
            # A bug of ours, for a model's exceptions end with its task. Without this thread
            # nothing here ever ends: a new process serves better.
            log.critical("the device thread failed", exc_info=error)
            self._closing = True
            self._post(self._listener.poisoned, f"unexpected {type(error).__name__}: {error}")

    def _receive(self) -> None:
        """Does what the loop asked for; waits for that only where there is nothing to run."""
        try:
            message = self._inbox.get(block=all(task.rests for task in self._ready.values()))
            while message is not None:
                message()
                message = self._inbox.get_nowait()
        except Empty:
            return

    def _take(self, task: Task) -> None:
        self._ready[task.sequence] = task
        self._fair.enter(task.tenant)
        if task.stop is not None:
            self._stop(task)

    def _drop(self, task: Task) -> None:
        if self._ready.pop(task.sequence, None) is not None:
            self._fair.leave(task.tenant)
        task.denoising = None
        task.fetched = {}
        self._sharing.forget(task)
        if task in self.running:
            self.running = tuple(other for other in self.running if other is not task)

    def _stop(self, task: Task) -> None:
        if task.sequence not in self._ready:
            return  # it ended meanwhile
        if not task.is_lease and task.stop is not Stop.CANCEL:
            return  # it is short and runs to its end
        checkpoint = None
        if task.stop is not Stop.CANCEL and task.denoising is not None:
            try:
                checkpoint = self._checkpoint(task)
            except Exception as error:
                self._fail(task, error)
                return
        self._drop(task)
        self._post(self._listener.stopped, task, checkpoint)

    def _turn(self) -> None:
        self._prepare_fellow()
        tasks = [task for task in self._ready.values() if not task.rests]
        if not tasks:
            return
        if len(tasks) == 1:
            batch = tasks
        else:
            entries = [task.entry(self._fair.of(task.tenant)) for task in tasks]
            batch = [tasks[i] for i in next_batch(entries, self._now(), self._limits)]
        self._switch_to(batch)
        if batch[0].is_lease:
            self._step(batch)
        else:
            self._run(batch[0])

    def _switch_to(self, batch: Sequence[Task]) -> None:
        before, self.running = self.running, tuple(batch)
        now = self._now()
        for task in batch:
            if task.started is None:
                task.started = now
        if not batch[0].is_lease:
            return  # a one-shot task goes in between; the lease it held up stays the current one
        for task in self._ready.values():
            if task.waiting:
                continue  # what others do until its part is here keeps nothing from it
            was, task.running = task.running, task in batch
            if was and not task.running:
                self._post(self._listener.preempted, task)
        if len(batch) > 1 and tuple(batch) != before:
            self._post(self._listener.batched, batch)

    def _prepare_fellow(self) -> None:
        """Begins one waiting lease that could share forwards with a running one.

        Whether it can is known only from its state, which `_begin` makes.
        """
        for running in self.running:
            if running.exact or not running.is_lease or len(self.running) >= self._limits.max_batch:
                return
            for task in self._ready.values():
                like = task.resident is running.resident and task.is_lease and not task.exact
                new = task.denoising is None and task.stop is None
                if like and new and not task.assign.lease.helpers:
                    self._begin(task)
                    return

    # ------------------------------------------------------------ one-shot tasks

    def _run(self, task: Task) -> None:
        begin = perf_counter()
        try:
            inputs = self._inputs(task)
            if task.call is not None:
                result = task.call()
            else:
                result = task.resident.loaded.run(task.stage, inputs, task.loras)
            task.run_seconds = perf_counter() - begin
            outputs = self._outputs(task, result)
            task.warnings = _warnings(result)
        except Exception as error:
            task.run_seconds = perf_counter() - begin
            self._fail(task, error)
            return
        self._charge([task], task.run_seconds)
        self._drop(task)
        self._post(self._listener.done, task, outputs)

    def _inputs(self, task: Task) -> dict[str, PortValue]:
        return {
            port: ports.decode(value, task.fetched) for port, value in task.assign.inputs.items()
        }

    def _outputs(self, task: Task, result: Any) -> Outputs:
        """Those that somebody reads, for the wire. A cancelled task keeps none."""
        if task.stop is Stop.CANCEL:
            return {}
        outputs: Outputs = {}
        for port in task.assign.outputs:
            if port not in result:
                raise InvalidInput(
                    f"stage {task.stage} has no output {port!r}; it has "
                    f"{', '.join(sorted(result))}",
                    field="outputs",
                )
            name = f"{task.name[1]}/{port}/{task.key.epoch}"
            outputs[port] = ports.encode(self._store, task.scope, name, result[port])
        return outputs

    # ------------------------------------------------------------ leases

    def _step(self, batch: Sequence[Task]) -> None:
        begun = [task for task in batch if task.denoising is not None or self._begin(task)]
        stepping = [task for task in begun if not self._through(task)]
        if len(stepping) == 1 and (stepping[0].shares or stepping[0].parted):
            self._advance_in_parts(stepping[0])
        elif stepping:
            self._advance(stepping)
        for task in begun:
            if task.sequence in self._ready and not task.waiting:
                self._after_step(task, stepped=task in stepping)

    def _begin(self, task: Task, resume: CheckpointState | None = None) -> bool:
        """Makes the lease's state, from `resume` or as assigned; a step follows at once."""
        begin = perf_counter()
        try:
            denoiser = task.resident.denoiser
            assert denoiser is not None, "admission saw to it"
            lease = task.assign.lease
            if resume is None and lease.HasField("resume"):
                resume = ports.decode_checkpoint(lease.resume, task.fetched)
            task.denoising = denoiser.start(
                self._inputs(task),
                task.loras,
                resume,
                [
                    (helper.name, None if resident is None else resident.loaded)
                    for helper, resident in zip(lease.helpers, task.helpers, strict=True)
                    if helper.kind == node_pb2.Helper.KIND_CONTROLNET
                ],
                task.assign.budget if task.assign.HasField("budget") else None,
                ports.step_cache_of(task.assign),
            )
            if not task.steps_run:
                self._sharing.begin(task)
            if not task.exact and not task.shares:
                task.batch_key = (task.resident.identity, denoiser.batch_key(task.denoising))
        except Exception as error:
            self._fail(task, error)
            return False
        task.run_seconds += perf_counter() - begin
        return True

    def _through(self, task: Task) -> bool:
        return task.denoising is not None and task.denoising.step >= task.denoising.total_steps

    def _advance(self, tasks: Sequence[Task]) -> None:
        """One step of each. Those of a batch that fails are tried again one by one."""
        begin = perf_counter()
        denoiser = tasks[0].resident.denoiser
        assert denoiser is not None, "it began these leases"
        denoisings = [task.denoising for task in tasks if task.denoising is not None]
        before: list[CheckpointState] = []
        try:
            if len(denoisings) > 1:
                before = [denoising.checkpoint() for denoising in denoisings]
            denoiser.advance(denoisings)
        except Exception as error:
            if len(tasks) == 1 or is_poisoned(error):
                for task in tasks:
                    self._fail(task, error)
                return
            log.warning("%d leases failed together, each goes alone", len(tasks), exc_info=error)
        else:
            seconds = perf_counter() - begin
            for task in tasks:
                task.run_seconds += seconds
                task.steps_run += 1
                task.parted = False
            self._charge(tasks, seconds)
            return
        # After the handler: the error held on to what the forward had allocated.
        self._advance_alone(tasks, before)

    def _advance_alone(self, tasks: Sequence[Task], before: Sequence[CheckpointState]) -> None:
        """Which of a batch is to blame cannot be told from its error, and any state may be half a
        step on: each goes back to where it was, if the forward was tried, and is stepped alone."""
        _free_memory()
        for task, state in zip_longest(tasks, before):
            if state is None or self._begin(task, state):
                self._advance([task])
        if all(task.sequence in self._ready for task in tasks):
            # Nobody is to blame but the batch, such as for its size.
            for task in tasks:
                task.batch_key = None

    # ------------------------------------------------------------ helpers elsewhere

    def _advance_in_parts(self, task: Task) -> None:
        """A step up to where a part from elsewhere is missing, or to its end."""
        begin = perf_counter()
        try:
            if not self._sharing.advance(task):
                # The device is for others until the part is here.
                self.running = tuple(other for other in self.running if other is not task)
        except Exception as error:
            self._fail(task, error)
            return
        seconds = perf_counter() - begin
        task.run_seconds += seconds
        self._charge([task], seconds)

    def _hear(self, task: Task, share: Share, what: Callable[[], None]) -> None:
        """Something of a helper that the lease still has."""
        if share not in task.shares:
            return
        try:
            what()
        except Exception as error:
            self._fail(task, error)
        else:
            if not task.shares and not task.exact:
                self._key(task)

    def _key(self, task: Task) -> None:
        """What the lease's next step may share a forward with."""
        if task.resident.denoiser is not None and task.denoising is not None:
            key = task.resident.denoiser.batch_key(task.denoising)
            task.batch_key = (task.resident.identity, key)

    def _after_step(self, task: Task, stepped: bool) -> None:
        denoising, lease = task.denoising, task.assign.lease
        assert denoising is not None
        step, total = denoising.step, denoising.total_steps
        try:
            if step >= total:
                result = denoising.finish()
                outputs = self._outputs(task, result)
                task.warnings = _warnings(result)
                self._drop(task)
                self._post(self._listener.done, task, outputs)
                return
            if not stepped:
                return
            if task.batch_key is not None:
                self._key(task)  # the next step may be of other shapes, as a pruned one's
            now = self._now()
            if now - task.told >= TELL_SECONDS:
                task.told = now
                self._post(self._listener.progressed, task, step, total, task.run_seconds)
            if lease.preview_every and step % lease.preview_every == 0:
                image = ports.inline(f"{task.prefix}/preview/{step}", denoising.preview())
                self._post(self._listener.previewed, task, step, image)
            if lease.checkpoint_every and step % lease.checkpoint_every == 0:
                self._post(self._listener.checkpointed, task, self._checkpoint(task))
        except Exception as error:
            self._fail(task, error)

    def _checkpoint(self, task: Task) -> node_pb2.Checkpoint:
        assert task.denoising is not None
        state = task.denoising.checkpoint()
        return ports.encode_checkpoint(state, f"{task.prefix}/checkpoint", self.fingerprint)

    def _charge(self, tasks: Sequence[Task], seconds: float) -> None:
        for task in tasks:
            self._fair.charge(task.tenant, seconds / len(tasks), task.weight)

    # ------------------------------------------------------------ trouble

    def _fail(self, task: Task, error: Exception) -> None:
        self._drop(task)
        if task.stop is Stop.CANCEL or isinstance(error, Cancelled):
            self._post(self._listener.stopped, task, None)
            return
        known, reason = failure_of(error)
        if isinstance(known, Internal):
            log.error("task %s failed", "/".join(task.name), exc_info=error)
        if reason == node_pb2.FAILURE_REASON_OUT_OF_MEMORY:
            _free_memory()
        self._post(self._listener.failed, task, known, reason)
        if is_poisoned(error):
            self._closing = True
            self._post(self._listener.poisoned, str(error))

    # ------------------------------------------------------------ back to the loop

    def _tell_sharing(self, task: Task, share: Share, constants: Constants) -> None:
        self._post(self._listener.sharing, task, share, constants)

    def _tell_asking(self, task: Task, share: Share, step: node_pb2.AssistStep) -> None:
        self._post(self._listener.asking, task, share, step)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        """Many posts, one wake-up: the loop takes all that has gathered when it gets there."""
        self._posts.append((function, arguments))
        if not self._armed:
            self._armed = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody is left to tell
                self._closing = True

    def _deliver(self) -> None:
        self._armed = False
        try:
            while self._posts:
                function, arguments = self._posts.popleft()
                function(*arguments)
        finally:
            if self._posts:  # a listener raised: the rest still goes
                self._loop.call_soon(self._deliver)


def _free_memory() -> None:
    """What failed work left in the allocator's cache."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _warnings(result: Mapping[str, PortValue]) -> list[str]:
    """What a model has to say to the caller beside its outputs."""
    said = result.get("warnings")
    return [str(each) for each in said] if isinstance(said, list) else []
