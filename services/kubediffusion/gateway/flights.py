# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A client's request under way: its images, and whoever listens to what happens to them.

Usually one client listens. With an idempotency key, a retry joins the flight, or reads what a
finished one left behind. The flight ends when its images are there, one failed, or nobody listens.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from kubediffusion.errors import Internal, KubeDiffusionError
from kubediffusion.gateway.attempts import TaskRun
from kubediffusion.gateway.checkpoints import Checkpoints, plan_digest
from kubediffusion.gateway.coordinator import ImageRun
from kubediffusion.gateway.delivery import Delivery
from kubediffusion.gateway.hooks import ImageContext
from kubediffusion.gateway.measures import Measures
from kubediffusion.gateway.plan import ImagePlan
from kubediffusion.gateway.planning import Order
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2, tensor_pb2

log = logging.getLogger(__name__)

# A client that reads slowly misses steps and previews, and never an image.
MAX_BACKLOG = 128


class Subscriber:
    """One listener's events, in order."""

    def __init__(self, flight: Flight) -> None:
        self.flight = flight
        self._events: deque[gateway_pb2.GenerateEvent] = deque(flight.history)
        self._wake: asyncio.Future[None] | None = None

    def push(self, event: gateway_pb2.GenerateEvent, dispensable: bool) -> None:
        if dispensable and len(self._events) >= MAX_BACKLOG:
            return
        self._events.append(event)
        self.wake()

    def wake(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def next(self) -> gateway_pb2.GenerateEvent:
        """Raises the flight's error at its end, if it has one, else StopAsyncIteration."""
        events, flight = self._events, self.flight
        while not events:
            if flight.ended or not flight.has(self):
                self.leave()
                if flight.error is not None:
                    raise flight.error
                raise StopAsyncIteration
            self._wake = asyncio.get_running_loop().create_future()
            try:
                await self._wake
            except BaseException:  # whoever waits is being cancelled: nobody will come again
                self.leave()
                raise
        return events.popleft()

    def leave(self) -> None:
        self.flight.leave(self)
        self._events.clear()


class Events(AsyncGenerator[gateway_pb2.GenerateEvent, None]):
    """What a client iterates over. The request begins with the first event that is asked for, and
    is cancelled by closing, by cancelling whoever waits, and by forgetting this object.

    A generator in all but its frame, which every event of every request would have to enter.
    """

    def __init__(self, begin: Callable[[], Subscriber]) -> None:
        self._begin = begin
        self._subscriber: Subscriber | None = None
        self._closed = False

    def __anext__(self) -> Coroutine[Any, Any, gateway_pb2.GenerateEvent]:
        if self._subscriber is None:
            if self._closed:
                return _nothing()
            self._subscriber = self._begin()
        return self._subscriber.next()

    async def asend(self, value: None) -> gateway_pb2.GenerateEvent:
        return await self.__anext__()

    async def athrow(self, *error: Any) -> gateway_pb2.GenerateEvent:
        self._leave()
        raise error[-1] if isinstance(error[-1], BaseException) else error[0]

    async def aclose(self) -> None:
        """When this returns, nothing of a request that has ended runs in this process."""
        self._leave()
        if self._subscriber is not None:
            await self._subscriber.flight.settled()

    def _leave(self) -> None:
        self._closed = True
        if self._subscriber is not None:
            self._subscriber.leave()

    def __del__(self) -> None:
        self._leave()


async def _nothing() -> gateway_pb2.GenerateEvent:
    raise StopAsyncIteration


class Flight:
    """All images of one request. The RunListener of each of them."""

    def __init__(
        self,
        request_id: str,
        request: gateway_pb2.GenerateRequest,
        delivery: Delivery,
        measures: Measures,
        *,
        keep: bool,
        now: Callable[[], float],
        on_end: Callable[[Flight], None],
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.request_id = request_id
        self.request = request
        self.history: list[gateway_pb2.GenerateEvent] = []
        self.error: KubeDiffusionError | None = None
        self.ended = False
        self.runs: list[ImageRun] = []
        # What it was asked to do, from when that is known until its end.
        self.order: Order | None = None
        self.nbytes = 0
        self.since = now()
        # Images of it that count against the queue's bound.
        self.admitted = 0
        # Stages (model, stage) of a request that waits for models to come up for the first time.
        self.held_stages: list[tuple[str, str]] = []
        self._checkpoints = checkpoints
        self._plans: dict[int, bytes] = {}
        self._delivery = delivery
        self._measures = measures
        self._previews = 0
        self._keep = keep
        self._now = now
        self._on_end = on_end
        self._subscribers: set[Subscriber] = set()
        self._work: set[asyncio.Task[None]] = set()
        self._previewing: set[int] = set()
        self._images_left = 0
        self._deadline: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------ listeners

    def subscribe(self) -> Subscriber:
        subscriber = Subscriber(self)
        self._subscribers.add(subscriber)
        return subscriber

    def leave(self, subscriber: Subscriber) -> None:
        """The last one to leave ends the flight."""
        self._subscribers.discard(subscriber)
        if not self._subscribers and not self.ended:
            self.end(None)

    def has(self, subscriber: Subscriber) -> bool:
        return subscriber in self._subscribers

    @property
    def listeners(self) -> int:
        return len(self._subscribers)

    # ------------------------------------------------------------ life

    def begin(self, runs: Sequence[ImageRun], cold: bool, ahead: int) -> None:
        self.runs = list(runs)
        self._images_left = len(self.runs)
        self.queued(cold=cold, ahead=ahead)
        for run in self.runs:
            if not self.ended:
                run.start()

    def end_at(self, seconds: float, error: KubeDiffusionError) -> None:
        """Fails with `error` unless it is over by then."""
        if self._deadline is None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(seconds, self.end, error)

    def end(self, error: KubeDiffusionError | None) -> None:
        """Frees all that the request holds, here and on the nodes. Safe to call again."""
        if self.ended:
            return
        self.ended, self.error = True, error
        if self._deadline is not None:
            self._deadline.cancel()
        for run in self.runs:
            run.close()
        current = asyncio.current_task()
        for task in self._work:
            if task is not current:
                task.cancel()
        self._measures.ended(self, self._now() - self.since)
        self._on_end(self)
        for subscriber in self._subscribers:
            subscriber.wake()

    @property
    def succeeded(self) -> bool:
        return self.ended and self.error is None and self._images_left == 0

    async def settled(self) -> None:
        if self.ended and self._work:
            await asyncio.wait(list(self._work))

    @property
    def has_begun(self) -> bool:
        return any(run.has_begun for run in self.runs)

    def whereabouts(self) -> list[str]:
        """Of each image: held (a model has no node), running, or queued (no node took it yet)."""
        if not self.runs:
            return ["held"] * self.admitted
        return [
            "held" if run.is_held else "running" if run.is_running else "queued"
            for run in self.runs
            if not run.closed
        ]

    @property
    def background_tasks(self) -> int:
        return len(self._work)

    # ------------------------------------------------------------ what runs tell

    def queued(self, *, cold: bool, ahead: int) -> None:
        self._emit(0, queued=gateway_pb2.Queued(cold=cold, ahead=ahead))

    def started(self, run: ImageRun, stage: str, node: str) -> None:
        self._emit(run.plan.index, started=gateway_pb2.Started(stage=stage, node=node))

    def stepped(self, run: ImageRun, step: int, total_steps: int) -> None:
        stepped = gateway_pb2.Stepped(step=step, total_steps=total_steps)
        self._emit(run.plan.index, dispensable=True, stepped=stepped)

    def resuming(self, plan: ImagePlan) -> ImagePlan:
        """It, with the checkpoints that an earlier run of the same left behind."""
        if self._checkpoints is None:
            return plan
        digest = self._plans[plan.index] = plan_digest(plan)
        return replace(plan, checkpoints=self._checkpoints.found(plan.index, digest))

    def checkpointed(self, run: ImageRun, task: str, checkpoint: node_pb2.Checkpoint) -> None:
        if self._checkpoints is not None:
            index = run.plan.index
            self._checkpoints.keep(index, self._plans[index], task, checkpoint)

    def resumed(self, run: ImageRun, task: TaskRun, reason: str) -> None:
        self._measures.retried(task, reason)
        step = task.checkpoint.step if task.checkpoint is not None else 0
        resumed = gateway_pb2.Resumed(stage=task.planned.stage, from_step=step, reason=reason)
        self._emit(run.plan.index, resumed=resumed)

    def held(self, run: ImageRun, models: Sequence[str]) -> None:
        if models:
            self._emit(run.plan.index, queued=gateway_pb2.Queued(cold=True))

    def failed(self, run: ImageRun, error: KubeDiffusionError) -> None:
        self.end(error)

    def previewed(self, run: ImageRun, step: int, image: tensor_pb2.TensorRef) -> None:
        index = run.plan.index
        if index not in self._previewing:  # one at a time; a late one is no use
            self._previewing.add(index)
            self.spawn(self._preview(run, step, image))

    def completed(self, run: ImageRun, image: tensor_pb2.Value) -> None:
        if not self._delivery.must_wait(image):
            picture = self._delivery.picture_now(image)
            picture.seed = run.plan.seed
            self._deliver(run, picture)
        else:
            self.spawn(self._complete(run, image))

    # ------------------------------------------------------------ pictures

    async def _preview(self, run: ImageRun, step: int, image: tensor_pb2.TensorRef) -> None:
        try:
            picture = await self._delivery.preview(image, self._context(run, preview=True))
            if picture is not None and not self.ended:
                picture.seed, picture.step = run.plan.seed, step
                self._emit(run.plan.index, dispensable=True, preview=picture)
                first, self._previews = not self._previews, self._previews + 1
                seconds = self._now() - self.since
                self._measures.previewed(self.request.workflow, seconds, first=first)
        finally:
            self._previewing.discard(run.plan.index)

    async def _complete(self, run: ImageRun, image: tensor_pb2.Value) -> None:
        picture = await self._delivery.picture(image, self._context(run), run)
        if picture is not None and not self.ended:
            picture.seed = run.plan.seed
            self._deliver(run, picture)

    def _context(self, run: ImageRun, preview: bool = False) -> ImageContext:
        return ImageContext(
            request_id=self.request_id,
            index=run.plan.index,
            seed=run.plan.seed,
            workflow=self.request.workflow,
            tenant=self.request.tenant,
            preview=preview,
        )

    def _deliver(self, run: ImageRun, picture: gateway_pb2.Image) -> None:
        run.close()
        picture.warnings.extend(run.warnings)
        for warning in run.warnings:
            log.warning("request %s: %s", self.request_id, warning)
        self.nbytes += len(picture.png)
        self._emit(run.plan.index, image=picture)
        self._images_left -= 1
        if self._images_left:
            return
        finished = gateway_pb2.Finished(seconds=self._now() - self.since)
        for done in self.runs:
            finished.stages.extend(done.times())
        self._emit(0, finished=finished)
        self.end(None)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Work that ends with the flight; an error of it ends the flight."""
        task = asyncio.create_task(self._guarded(work))
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        with self.failing():
            await work

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Whatever is raised inside ends the flight."""
        try:
            yield
        except KubeDiffusionError as error:
            self.end(error)
        except Exception as error:
            log.exception("request %s", self.request_id)
            self.end(Internal(f"unexpected {type(error).__name__}; see the gateway's log"))

    def _emit(self, index: int, *, dispensable: bool = False, **kind: Any) -> None:
        event = gateway_pb2.GenerateEvent(request_id=self.request_id, index=index, **kind)
        if self._keep and not dispensable:
            self.history.append(event)
        for subscriber in self._subscribers:
            subscriber.push(event, dispensable)
