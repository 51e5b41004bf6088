# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Requests that outlive their clients, and the gateways that run them: submitted, looked at later,
kept for a while.

What is submitted lies in the database, and every gateway that shares it takes what it has room for
(see `job_store`). Once a beat it renews its leases, hears what is to be cancelled, and takes over
what a gateway that vanished has left, from its last checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

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
from kubediffusion.gateway.job_database import GOING, JobDatabase
from kubediffusion.gateway.job_results import JobResults
from kubediffusion.gateway.job_runs import Generates, JobCheckpoints, JobRun
from kubediffusion.gateway.job_store import End, NewJob, TakenJob
from kubediffusion.gateway.job_tables import ENDED
from kubediffusion.gateway.results import body_digest
from kubediffusion.v1alpha1 import gateway_pb2

log = logging.getLogger(__name__)
MAX_PAGE = 200
DEFAULT_PAGE = 50
# Between two looks at a job that another gateway is to cancel, in seconds.
CANCEL_LOOK = 0.2
# Beats between two looks for jobs that are too old to keep.
TIDY_BEATS = 30


class Jobs:
    """Times are wall-clock seconds, because they are shown to people, outlive the process and are
    compared by several gateways."""

    def __init__(
        self,
        gateway: Generates,
        database: str,
        limits: JobLimits,
        wall_clock: Callable[[], float] = time.time,
        draw: Callable[[], float] = random.random,
        results: str = "",
    ) -> None:
        """`results`: where images go (see `job_results`), empty for the database. `draw` gives
        random numbers from 0 up to 1, so that gateways do not beat in step."""
        self._gateway = gateway
        self._limits = limits
        self._clock = wall_clock
        self._draw = draw
        self._database = JobDatabase(database, limits)
        self._results_url = results
        self._results: JobResults | None = None
        self._owner = uuid.uuid4().hex
        self._active: dict[str, JobRun] = {}
        self._counts: dict[int, int] = {}
        self._submitting = asyncio.Lock()
        self._taking = asyncio.Lock()
        self._beating: asyncio.Task[None] | None = None
        self._beats = 0
        self._closed = False

    async def start(self) -> None:
        """Opens the database and takes what earlier gateways left in it."""
        if self._results_url:
            self._results = await asyncio.to_thread(JobResults, self._results_url)
        await self._database.open()
        await self._take()
        self._beating = asyncio.create_task(self._beat_on(), name="jobs")

    def close(self) -> None:
        """Takes no job: those that wait are left to other gateways."""
        self._closed = True

    async def stop(self) -> None:
        """Ends what runs; with a database that stays, it goes on in another gateway. Safe to call
        again."""
        self.close()
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
            self._beating = None
        async with self._taking:
            runs = list(self._active.values())
        for run in runs:
            run.abandon()
        await asyncio.gather(*(run.task for run in runs if run.task), return_exceptions=True)
        try:
            if self._database.is_open:
                await self._database.do(lambda store: store.give_back(self._owner))
        except KubeDiffusionError as error:
            log.warning("jobs were not handed over, and wait for their leases to lapse: %s", error)
        await self._database.close()

    @property
    def active(self) -> int:
        return len(self._active)

    def counts(self) -> dict[int, int]:
        """Jobs by state: those that run here, and of the others all in the database."""
        return {**self._counts, gateway_pb2.JOB_STATE_RUNNING: len(self._active)}

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
            await self._check_room()
            kept = gateway_pb2.GenerateRequest()
            kept.CopyFrom(request)
            job = NewJob(f"job-{uuid.uuid4().hex}", kept, body_digest(request), self._clock())
            if not await self._database.do(lambda store: store.add(job)):
                # Another gateway was handed this key at the same time.
                found = await self._find(request)
                if found is None:
                    raise Unavailable("the job of this key has just failed; submit it again")
                return found
            await self._take()
        return await self.get(job.id)

    async def _check_room(self) -> None:
        """Raises Overloaded."""
        if len(self._active) < self._limits.running:
            return
        await self._count()
        waiting = self._counts.get(gateway_pb2.JOB_STATE_QUEUED, 0)
        if waiting >= self._limits.waiting:
            raise Overloaded(
                f"{waiting} jobs wait already; submit it again later",
                retry_after=5.0,
                reason="QueueFull",
            )

    async def _find(self, request: gateway_pb2.GenerateRequest) -> gateway_pb2.Job | None:
        key = request.idempotency_key
        if not key:
            return None
        found = await self._database.do(lambda store: store.by_key(request.tenant, key))
        if found is None:
            return None
        job, body = found
        if body != body_digest(request):
            raise Conflict(
                f"the key {key!r} was used for another job, {job.id}; use a new key",
                field="idempotency_key",
            )
        return job

    async def get(self, job_id: str, tenant: str | None = None) -> gateway_pb2.Job:
        """With its images. Raises NotFound, also where it is another tenant's than the one named:
        whose it is, and that it is, is nobody else's business."""
        found = await self._database.do(lambda store: store.get(job_id, tenant))
        if found is None:
            raise NotFound(
                f"there is no job {job_id!r}: the id is wrong, or it ended long ago", field="id"
            )
        for image, name in zip(found.job.images, found.names, strict=True):
            if name:
                image.png = await asyncio.to_thread(self._elsewhere().read, name)
        return self._with_progress(found.job)

    def _elsewhere(self) -> JobResults:
        if self._results is None:
            raise Unavailable(
                "the job's images are in job results that this gateway was not told of; set "
                "job_results as for the gateway that drew them",
                reason="JobResults",
            )
        return self._results

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
        jobs, more = await self._database.do(
            lambda store: store.page(
                size, before, request.workflow, request.tenant, list(request.states)
            )
        )
        return gateway_pb2.ListResponse(
            jobs=[self._with_progress(job) for job in jobs],
            next_page_token="" if more is None else str(more),
        )

    async def cancel(self, job_id: str, tenant: str | None = None) -> gateway_pb2.Job:
        """Ends a job that has not ended, whichever gateway runs it; one that has stays as it is.

        Raises NotFound as `get`. Where another gateway runs it, it may still run on return, for
        about a beat; a job that is lost meanwhile is not run again.
        """
        job = await self.get(job_id, tenant)
        run = self._active.get(job_id)
        if run is not None and run.task is not None:
            run.cancel()
            await asyncio.wait([run.task])
            job = await self.get(job_id, tenant)
        if job.state in ENDED:
            return job
        end = self._end(gateway_pb2.JOB_STATE_CANCELLED, Cancelled("the job was cancelled"))
        await self._database.do(lambda store: store.cancel(job_id, end))
        job = await self.get(job_id, tenant)
        waited = 0.0
        while job.state not in ENDED and waited < self._limits.cancel_wait:
            await asyncio.sleep(CANCEL_LOOK)
            waited += CANCEL_LOOK
            job = await self.get(job_id, tenant)
        return job

    # ------------------------------------------------------------ beating

    async def _beat_on(self) -> None:
        while True:
            await asyncio.sleep(self._limits.beat * (0.5 + self._draw()))
            try:
                await self.beat()
            except KubeDiffusionError as error:
                log.warning("jobs: %s", error)
            except Exception:
                log.exception("jobs")

    async def beat(self) -> None:
        """Renews the leases held here, lets go of what was lost, and takes what lies about."""
        held = dict(self._active)
        steps = {job_id: run.progress for job_id, run in held.items()}
        now = self._clock()
        mine = await self._database.do(lambda store: store.renew(self._owner, now, steps))
        for job_id, run in held.items():
            epoch, cancel = mine.get(job_id, (0, False))
            if self._active.get(job_id) is not run:
                continue  # it has ended meanwhile
            if epoch != run.job.lease.epoch:
                log.warning("job %s was taken over by another gateway", job_id)
                run.abandon()
            elif cancel:
                run.cancel()
        await self._take()
        self._beats += 1
        if self._beats % TIDY_BEATS == 0:
            await self._make_room(now)
        await self._count()

    async def _count(self) -> None:
        self._counts = await self._database.do(lambda store: store.counts())

    async def _take(self) -> None:
        """Begins as many jobs as there is room for."""
        async with self._taking:
            room = self._limits.running - len(self._active)
            if self._closed or room <= 0:
                return
            here, now = list(self._active), self._clock()
            taken = await self._database.do(lambda store: store.take(self._owner, now, room, here))
            for job in taken:
                self._begin(job)

    # ------------------------------------------------------------ running

    def _begin(self, job: TakenJob) -> None:
        lease = job.lease
        if job.losses:
            log.warning("job %s was left by its gateway; it goes on here", lease.job)
        checkpoints = JobCheckpoints(
            job.checkpoints,
            lambda kept: self._database.do(lambda store: store.keep(lease, kept)),
            self._limits.checkpoint_every,
        )
        run = self._active[lease.job] = JobRun(job, checkpoints)
        run.task = asyncio.create_task(self._run(run), name=lease.job)
        run.task.add_done_callback(lambda _: self._forget(run))

    def _forget(self, run: JobRun) -> None:
        if self._active.get(run.job.lease.job) is run:
            del self._active[run.job.lease.job]

    async def _run(self, run: JobRun) -> None:
        try:
            end = await self._outcome(run)
            await run.checkpoints.close(flush=end is None)
            if end is not None:
                await self._finish(run, end)
        except KubeDiffusionError as error:
            # Its lease lapses, and it is run again.
            log.warning("the end of job %s was not written: %s", run.job.lease.job, error)
        self._forget(run)
        if self._closed:
            return
        try:
            await self._take()
            await self._count()
        except KubeDiffusionError as error:
            log.warning("jobs: %s", error)

    async def _outcome(self, run: JobRun) -> End | None:
        """How it ended; None where that is for another gateway to say."""
        job = run.job
        try:
            if job.cancel_requested:
                raise Cancelled("the job was cancelled")
            if job.losses > self._limits.losses:
                raise Unavailable(
                    f"{job.losses} gateways vanished while they ran it; look into their logs "
                    "before you submit it again",
                    reason="Interrupted",
                )
            images = await run.images(self._gateway, self._clock())
        except asyncio.CancelledError:
            if not run.cancelled:
                return None
            return self._end(gateway_pb2.JOB_STATE_CANCELLED, Cancelled("the job was cancelled"))
        except Cancelled as error:
            return self._end(gateway_pb2.JOB_STATE_CANCELLED, error)
        except KubeDiffusionError as error:
            if self._closed and isinstance(error, Unavailable):
                return None  # it is this gateway that goes, and nothing is wrong with the job
            return self._end(gateway_pb2.JOB_STATE_FAILED, error)
        except Exception as error:
            log.exception("job %s", job.lease.job)
            shown = Internal(f"unexpected {type(error).__name__}; see the gateway's log")
            return self._end(gateway_pb2.JOB_STATE_FAILED, shown)
        return self._end(gateway_pb2.JOB_STATE_SUCCEEDED, None, images)

    def _end(
        self,
        state: gateway_pb2.JobState,
        error: KubeDiffusionError | None,
        images: list[gateway_pb2.Image] | None = None,
    ) -> End:
        return End(
            state,
            self._clock(),
            "" if error is None else error.reason,
            "" if error is None else str(error),
            images or (),
        )

    async def _finish(self, run: JobRun, end: End) -> None:
        lease, progress, results = run.job.lease, run.progress, self._results
        if results is not None and end.images:
            names = await asyncio.to_thread(results.write, lease.job, lease.epoch, end.images)
            end = replace(end, names=names)
        if await self._database.do(lambda store: store.finish(lease, end, progress)):
            await self._make_room(end.ended)
            return
        log.warning("job %s ended here, but another gateway had taken it over", lease.job)
        if results is not None:
            await asyncio.to_thread(results.remove, lease.job, lease.epoch)

    async def _make_room(self, now: float) -> None:
        gone = await self._database.do(lambda store: store.make_room(now))
        for job in gone if self._results is not None else ():
            await asyncio.to_thread(self._elsewhere().remove, job)

    def _with_progress(self, job: gateway_pb2.Job) -> gateway_pb2.Job:
        run = self._active.get(job.id)
        if job.state not in ENDED and run is not None:
            job.step, job.total_steps = run.progress
        return job
