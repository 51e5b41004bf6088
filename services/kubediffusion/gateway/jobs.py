# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Requests that outlive their clients: submitted, looked at later, kept for a while."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from kubediffusion.errors import (
    Cancelled,
    Conflict,
    Internal,
    InvalidInput,
    KubeDiffusionError,
    NotFound,
    Overloaded,
    Unavailable,
)
from kubediffusion.gateway.config import JobLimits
from kubediffusion.gateway.job_store import ENDED, JobStore, NewJob
from kubediffusion.gateway.results import body_digest
from kubediffusion.v1alpha1 import gateway_pb2

T = TypeVar("T")
GOING = "the gateway is shutting down; ask another one"
MAX_PAGE = 200
DEFAULT_PAGE = 50


class Generates(Protocol):
    def generate(
        self, request: gateway_pb2.GenerateRequest
    ) -> AsyncGenerator[gateway_pb2.GenerateEvent, None]: ...

    async def check(self, request: gateway_pb2.GenerateRequest) -> None: ...


class Jobs:
    """Times are wall-clock seconds, because they are shown to people and outlive the process."""

    def __init__(
        self,
        gateway: Generates,
        database: str,
        limits: JobLimits,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._gateway = gateway
        self._database = database
        self._limits = limits
        self._clock = wall_clock
        # SQLite wants one thread; other databases do not mind.
        self._thread = ThreadPoolExecutor(1, "gateway-jobs")
        self._slots = asyncio.Semaphore(limits.running)
        self._active: dict[str, asyncio.Task[None]] = {}
        self._progress: dict[str, tuple[int, int]] = {}
        self._cancelled: set[str] = set()
        self._running: set[str] = set()
        self._ended: dict[int, int] = {}
        self._submitting = asyncio.Lock()
        self._store: JobStore | None = None
        self._closed = False

    async def start(self) -> None:
        """Opens the database and runs again what an earlier gateway left and may be run again."""
        loop = asyncio.get_running_loop()
        self._store = await loop.run_in_executor(
            self._thread, JobStore, self._database, self._limits
        )
        for job in await self._do(lambda store: store.interrupted()):
            self._begin(job)
        self._ended = await self._do(lambda store: store.ended())

    def close(self) -> None:
        """Takes no job and begins none: those that wait are left to the next gateway."""
        self._closed = True
        for job_id, task in self._active.items():
            if job_id not in self._running:
                task.cancel()

    async def stop(self) -> None:
        """Ends what runs; with a database that stays, jobs with a key go on at the next start."""
        tasks = list(self._active.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._store is not None:
            await self._do(lambda store: store.close())
            self._store = None
        self._thread.shutdown()

    @property
    def active(self) -> int:
        return len(self._active)

    def counts(self) -> dict[int, int]:
        """Jobs in the store by state."""
        running = len(self._running)
        return {
            **self._ended,
            gateway_pb2.JOB_STATE_RUNNING: running,
            gateway_pb2.JOB_STATE_QUEUED: len(self._active) - running,
        }

    # ------------------------------------------------------------ what clients ask

    async def submit(self, request: gateway_pb2.GenerateRequest) -> gateway_pb2.Job:
        """Raises what the request itself is wrong in at once; Overloaded if too many wait."""
        await self._gateway.check(request)
        async with self._submitting:
            if self._closed:
                raise Unavailable(GOING)
            found = await self._find(request)
            if found is not None:
                return found
            if len(self._active) >= self._limits.running + self._limits.waiting:
                raise Overloaded(
                    f"{len(self._active)} jobs wait or run already; submit it again later",
                    retry_after=5.0,
                    reason="QueueFull",
                )
            kept = gateway_pb2.GenerateRequest()
            kept.CopyFrom(request)
            job = NewJob(f"job-{uuid.uuid4().hex}", kept, body_digest(request), self._clock())
            await self._do(lambda store: store.add(job))
            self._begin(job)
        return await self.get(job.id)

    async def _find(self, request: gateway_pb2.GenerateRequest) -> gateway_pb2.Job | None:
        key = request.idempotency_key
        if not key:
            return None
        found = await self._do(lambda store: store.by_key(request.tenant, key))
        if found is None:
            return None
        job, body = found
        if body != body_digest(request):
            raise Conflict(
                f"the key {key!r} was used for another job, {job.id}; use a new key",
                field="idempotency_key",
            )
        return job

    async def get(self, job_id: str) -> gateway_pb2.Job:
        """With its images. Raises NotFound."""
        job = await self._do(lambda store: store.get(job_id))
        if job is None:
            raise NotFound(
                f"there is no job {job_id!r}: the id is wrong, or it ended long ago", field="id"
            )
        return self._with_progress(job)

    async def list(self, request: gateway_pb2.ListRequest) -> gateway_pb2.ListResponse:
        """Youngest first, without images."""
        size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
        before: int | None = None
        if request.page_token:
            if not request.page_token.isascii() or not request.page_token.isdigit():
                raise InvalidInput(
                    "this is no token of a page; send next_page_token of the page before",
                    field="page_token",
                )
            before = min(int(request.page_token[:18]), 2**62)
        jobs, more = await self._do(
            lambda store: store.page(
                size, before, request.workflow, request.tenant, list(request.states)
            )
        )
        return gateway_pb2.ListResponse(
            jobs=[self._with_progress(job) for job in jobs],
            next_page_token="" if more is None else str(more),
        )

    async def cancel(self, job_id: str) -> gateway_pb2.Job:
        """Ends a job that has not ended; one that has stays as it is. Raises NotFound."""
        task = self._active.get(job_id)
        if task is not None:
            self._cancelled.add(job_id)
            task.cancel()
            await asyncio.wait([task])
        return await self.get(job_id)

    # ------------------------------------------------------------ running

    def _begin(self, job: NewJob) -> None:
        task = asyncio.create_task(self._run(job), name=job.id)
        self._active[job.id] = task
        task.add_done_callback(lambda _: self._forget(job.id))

    def _forget(self, job_id: str) -> None:
        self._active.pop(job_id, None)
        self._progress.pop(job_id, None)
        self._cancelled.discard(job_id)
        self._running.discard(job_id)

    async def _run(self, job: NewJob) -> None:
        try:
            async with self._slots:
                self._running.add(job.id)
                images = await self._generate(job)
        except asyncio.CancelledError:
            if job.id in self._cancelled:
                error = Cancelled("the job was cancelled")
                await self._finish(job, gateway_pb2.JOB_STATE_CANCELLED, error)
            # Otherwise the gateway is stopping, and the next one finds the job unfinished.
        except KubeDiffusionError as error:
            await self._finish(job, gateway_pb2.JOB_STATE_FAILED, error)
        except Exception as error:
            shown = Internal(f"unexpected {type(error).__name__}")
            await self._finish(job, gateway_pb2.JOB_STATE_FAILED, shown)
            raise
        else:
            await self._finish(job, gateway_pb2.JOB_STATE_SUCCEEDED, None, images)

    async def _generate(self, job: NewJob) -> list[gateway_pb2.Image]:
        await self._do(
            lambda store: store.update(
                job.id, state=gateway_pb2.JOB_STATE_RUNNING, started=self._clock()
            )
        )
        while True:
            try:
                return await self._images(job)
            except Overloaded as error:
                if error.reason != "QueueFull":
                    raise
                await asyncio.sleep(min(error.retry_after, 5.0))

    async def _images(self, job: NewJob) -> list[gateway_pb2.Image]:
        images: dict[int, gateway_pb2.Image] = {}
        events = self._gateway.generate(job.request)
        try:
            async for event in events:
                kind = event.WhichOneof("kind")
                if kind == "stepped":
                    step = event.stepped
                    self._progress[job.id] = (step.step, step.total_steps)
                elif kind == "image":
                    images[event.index] = event.image
        finally:
            await events.aclose()
        return [images[index] for index in sorted(images)]

    async def _finish(
        self,
        job: NewJob,
        state: gateway_pb2.JobState,
        error: KubeDiffusionError | None,
        images: list[gateway_pb2.Image] | None = None,
    ) -> None:
        step, total = self._progress.get(job.id, (0, 0))

        def write(store: JobStore) -> dict[int, int]:
            store.update(job.id, step=step, total_steps=total)
            store.finish(
                job.id,
                state,
                self._clock(),
                reason="" if error is None else error.reason,
                message="" if error is None else str(error),
                images=images or (),
            )
            return store.ended()

        self._ended = await self._do(write)

    def _with_progress(self, job: gateway_pb2.Job) -> gateway_pb2.Job:
        if job.state not in ENDED and (now := self._progress.get(job.id)) is not None:
            job.step, job.total_steps = now
        return job

    async def _do(self, work: Callable[[JobStore], T]) -> T:
        store: Any = self._store
        if store is None:
            raise Unavailable(GOING)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, store)
