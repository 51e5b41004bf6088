# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs in a database. Everything here blocks: `jobs.Jobs` calls it from one worker thread.

The table is the queue that all gateways of one database share. A gateway takes a job by a lease: it
is the job's `owner` until `lease_until`, and renews that while it runs it. A job whose lease has
lapsed, or that was given back, is anybody's. Taking it raises its `epoch`, and every write of a run
names the epoch that it was given, so a gateway that was taken for dead can do no harm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from kubediffusion.gateway.config import JobLimits
from kubediffusion.gateway.job_tables import (
    ENDED,
    FAILED,
    checkpoints,
    images,
    jobs,
    open_engine,
)
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2

_unfinished = jobs.c.state.not_in(ENDED)


@dataclass(frozen=True, slots=True)
class NewJob:
    id: str
    request: gateway_pb2.GenerateRequest
    # Two requests with one idempotency key are one job only if this is equal.
    body: bytes
    created: float


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run a job, and to write its end."""

    job: str
    owner: str
    epoch: int


@dataclass(frozen=True, slots=True)
class KeptCheckpoint:
    number: int  # of the image
    task: str
    plan: bytes
    checkpoint: node_pb2.Checkpoint


@dataclass(frozen=True, slots=True)
class TakenJob:
    lease: Lease
    request: gateway_pb2.GenerateRequest
    started: float
    losses: int
    cancel_requested: bool
    checkpoints: Sequence[KeptCheckpoint]


@dataclass(frozen=True, slots=True)
class End:
    """How a job ended; `ended` in seconds of the wall clock."""

    state: gateway_pb2.JobState
    ended: float
    reason: str = ""
    message: str = ""
    images: Sequence[gateway_pb2.Image] = ()
    # Where the images' bytes are, if they are not to be in the database.
    names: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class FoundJob:
    job: gateway_pb2.Job
    # Of each of its images: where its bytes are, or "" where they are in it.
    names: Sequence[str]


class JobStore:
    """Raises SQLAlchemyError wherever the database does (see `job_database`)."""

    def __init__(self, url: str, limits: JobLimits) -> None:
        self._limits = limits
        self._engine = open_engine(url)

    def close(self) -> None:
        self._engine.dispose()

    # ------------------------------------------------------------ coming and being found

    def add(self, job: NewJob) -> bool:
        """Whether it is a job now; it is not where another has its key."""
        request = job.request
        try:
            with self._engine.begin() as db:
                db.execute(
                    jobs.insert().values(
                        id=job.id,
                        workflow=request.workflow,
                        tenant=request.tenant,
                        idempotency_key=request.idempotency_key,
                        state=gateway_pb2.JOB_STATE_QUEUED,
                        created=job.created,
                        body=job.body,
                        request=request.SerializeToString(),
                    )
                )
        except IntegrityError:
            # Or it is there already, where a first try was answered by a lost connection.
            with self._engine.connect() as db:
                return (
                    db.execute(sa.select(jobs.c.id).where(jobs.c.id == job.id)).first() is not None
                )
        return True

    def by_key(self, tenant: str, key: str) -> tuple[gateway_pb2.Job, bytes] | None:
        """The youngest job with that key that has not failed, and its body's digest."""
        query = (
            jobs.select()
            .where(
                jobs.c.tenant == tenant,
                jobs.c.idempotency_key == key,
                jobs.c.state.not_in(FAILED),
            )
            .order_by(jobs.c.serial.desc())
        )
        with self._engine.connect() as db:
            row = db.execute(query).first()
        return None if row is None else (_to_job(row), row.body)

    # ------------------------------------------------------------ leases

    def take(
        self, owner: str, now: float, most: int, besides: Collection[str] = ()
    ) -> list[TakenJob]:
        """The oldest jobs that nobody runs, at most so many; `besides` those that run here.

        Several gateways may ask at once: each job goes to one of them.
        """
        query = (
            sa.select(jobs.c.id, jobs.c.epoch)
            .where(_unfinished, _free(now), jobs.c.id.not_in(list(besides)))
            .order_by(jobs.c.serial)
            .limit(most)
        )
        taken: list[TakenJob] = []
        with self._engine.connect() as db:
            candidates = db.execute(query).all()
        for job_id, epoch in candidates:
            lease = Lease(job_id, owner, epoch + 1)
            with self._engine.begin() as db:
                claimed = db.execute(
                    jobs.update()
                    .where(jobs.c.id == job_id, jobs.c.epoch == epoch, _unfinished, _free(now))
                    .values(
                        state=gateway_pb2.JOB_STATE_RUNNING,
                        started=sa.func.coalesce(jobs.c.started, now),
                        owner=owner,
                        epoch=lease.epoch,
                        lease_until=now + self._limits.lease,
                        # Who gave it back is its owner no more.
                        losses=jobs.c.losses + sa.case((jobs.c.owner != "", 1), else_=0),
                    )
                )
                if claimed.rowcount:
                    taken.append(self._taken(db, lease))
        return taken

    def _taken(self, db: sa.Connection, lease: Lease) -> TakenJob:
        row = db.execute(jobs.select().where(jobs.c.id == lease.job)).one()
        kept = db.execute(checkpoints.select().where(checkpoints.c.job == lease.job))
        return TakenJob(
            lease,
            gateway_pb2.GenerateRequest.FromString(row.request),
            row.started,
            row.losses,
            row.cancel_requested,
            [
                KeptCheckpoint(
                    each.number,
                    each.task,
                    each.plan,
                    node_pb2.Checkpoint.FromString(each.checkpoint),
                )
                for each in kept
            ],
        )

    def renew(
        self, owner: str, now: float, running: Mapping[str, tuple[int, int]]
    ) -> dict[str, tuple[int, bool]]:
        """Of each job of `running`, with its steps, that is still the owner's: its epoch, and
        whether it is to be cancelled. The lease on anything else lapses."""
        mine = sa.and_(jobs.c.owner == owner, jobs.c.id.in_(list(running)), _unfinished)
        with self._engine.begin() as db:
            db.execute(jobs.update().where(mine).values(lease_until=now + self._limits.lease))
            for job_id, (step, total) in running.items():
                db.execute(
                    jobs.update()
                    .where(mine, jobs.c.id == job_id)
                    .values(step=step, total_steps=total)
                )
            rows = db.execute(
                sa.select(jobs.c.id, jobs.c.epoch, jobs.c.cancel_requested).where(mine)
            ).all()
        return {row.id: (row.epoch, row.cancel_requested) for row in rows}

    def give_back(self, owner: str) -> None:
        """What the owner has not ended is anybody's again, at once."""
        with self._engine.begin() as db:
            db.execute(
                jobs.update()
                .where(jobs.c.owner == owner, _unfinished)
                .values(state=gateway_pb2.JOB_STATE_QUEUED, owner="", lease_until=None)
            )

    def keep(self, lease: Lease, kept: Sequence[KeptCheckpoint]) -> None:
        """Checkpoints in place of the ones before; nothing where the lease is another's now."""
        with self._engine.begin() as db:
            # The write is the lock: nobody takes the job over between it and the rest.
            held = db.execute(jobs.update().where(_held(lease)).values(owner=lease.owner))
            if not held.rowcount:
                return
            table = checkpoints
            for each in kept:
                db.execute(
                    table.delete().where(
                        table.c.job == lease.job,
                        table.c.number == each.number,
                        table.c.task == each.task,
                    )
                )
                db.execute(
                    table.insert().values(
                        job=lease.job,
                        number=each.number,
                        task=each.task,
                        plan=each.plan,
                        checkpoint=each.checkpoint.SerializeToString(),
                    )
                )

    # ------------------------------------------------------------ ending

    def finish(self, lease: Lease, end: End, progress: tuple[int, int] = (0, 0)) -> bool:
        """The end of a job, with its images, in one transaction; whether that was still the
        lease's to write."""
        names = end.names or [""] * len(end.images)
        nbytes = sum(image.ByteSize() for image in end.images)
        blobs = [
            _without_bytes(image) if name else image.SerializeToString()
            for image, name in zip(end.images, names, strict=True)
        ]
        step, total = progress
        with self._engine.begin() as db:
            written = db.execute(
                jobs.update()
                .where(_held(lease))
                .values(**_ended(end), image_bytes=nbytes, step=step, total_steps=total)
            )
            if not written.rowcount:
                return False
            for number, (blob, name) in enumerate(zip(blobs, names, strict=True)):
                values = {"job": lease.job, "number": number, "image": blob, "name": name}
                db.execute(images.insert().values(values))
            db.execute(checkpoints.delete().where(checkpoints.c.job == lease.job))
        return True

    def cancel(self, job_id: str, end: End) -> None:
        """Ends a job that nobody runs; asks whoever runs it to end it."""
        this = sa.and_(jobs.c.id == job_id, _unfinished)
        with self._engine.begin() as db:
            db.execute(jobs.update().where(this).values(cancel_requested=True))
            ended = db.execute(
                jobs.update()
                .where(this, _free(end.ended))
                .values(**_ended(end), epoch=jobs.c.epoch + 1)
            )
            if ended.rowcount:
                db.execute(checkpoints.delete().where(checkpoints.c.job == job_id))

    def make_room(self, now: float) -> list[str]:
        """Drops ended jobs, oldest first, that are too old, too many or too large together; those
        of them whose images are elsewhere."""
        limits = self._limits
        query = (
            sa.select(jobs.c.id, jobs.c.ended, jobs.c.image_bytes)
            .where(jobs.c.state.in_(ENDED))
            .order_by(jobs.c.serial.desc())
        )
        with self._engine.begin() as db:
            kept, nbytes, old = 0, 0, []
            for row in db.execute(query):
                kept, nbytes = kept + 1, nbytes + row.image_bytes
                too_old = row.ended is not None and row.ended < now - limits.seconds
                if too_old or kept > limits.count or nbytes > limits.image_bytes:
                    old.append(row.id)
            elsewhere = sa.select(images.c.job).where(images.c.job.in_(old), images.c.name != "")
            named = sorted(set(db.execute(elsewhere).scalars()))
            for job_id in old:
                db.execute(images.delete().where(images.c.job == job_id))
                db.execute(jobs.delete().where(jobs.c.id == job_id))
        return named

    # ------------------------------------------------------------ looking

    def counts(self) -> dict[int, int]:
        """Jobs by state, of all gateways."""
        query = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
        with self._engine.connect() as db:
            return {row[0]: row[1] for row in db.execute(query)}

    def get(self, job_id: str, tenant: str | None = None) -> FoundJob | None:
        """With its images; of that tenant, if one is named."""
        query = jobs.select().where(jobs.c.id == job_id)
        if tenant is not None:
            query = query.where(jobs.c.tenant == tenant)
        with self._engine.connect() as db:
            row = db.execute(query).first()
            if row is None:
                return None
            job = _to_job(row)
            query = images.select().where(images.c.job == job_id).order_by(images.c.number)
            found = db.execute(query).all()
        job.images.extend(gateway_pb2.Image.FromString(image.image) for image in found)
        return FoundJob(job, [image.name for image in found])

    def page(
        self,
        size: int,
        before: int | None,
        workflow: str,
        tenant: str,
        states: Sequence[gateway_pb2.JobState],
    ) -> tuple[list[gateway_pb2.Job], int | None]:
        """Youngest first, without images; and the serial that the next page begins before."""
        query = jobs.select().order_by(jobs.c.serial.desc()).limit(size + 1)
        if before is not None:
            query = query.where(jobs.c.serial < before)
        if workflow:
            query = query.where(jobs.c.workflow == workflow)
        if tenant:
            query = query.where(jobs.c.tenant == tenant)
        if states:
            query = query.where(jobs.c.state.in_(list(states)))
        with self._engine.connect() as db:
            rows = db.execute(query).all()
        more = rows[size - 1].serial if len(rows) > size else None
        return [_to_job(row) for row in rows[:size]], more


def _without_bytes(image: gateway_pb2.Image) -> bytes:
    rest = gateway_pb2.Image()
    rest.CopyFrom(image)
    rest.ClearField("png")
    return rest.SerializeToString()


def _free(now: float) -> sa.ColumnElement[bool]:
    return sa.or_(jobs.c.lease_until.is_(None), jobs.c.lease_until < now)


def _held(lease: Lease) -> sa.ColumnElement[bool]:
    return sa.and_(
        jobs.c.id == lease.job,
        jobs.c.owner == lease.owner,
        jobs.c.epoch == lease.epoch,
        _unfinished,
    )


def _ended(end: End) -> dict[str, object]:
    return {
        "state": end.state,
        "ended": end.ended,
        "reason": end.reason,
        "message": end.message,
        "request": b"",  # uploads need not be kept
        "lease_until": None,
    }


def _to_job(row: sa.Row) -> gateway_pb2.Job:
    job = gateway_pb2.Job(
        id=row.id,
        workflow=row.workflow,
        state=row.state,
        step=row.step,
        total_steps=row.total_steps,
        reason=row.reason,
        message=row.message,
        tenant=row.tenant,
    )
    for name in ("created", "started", "ended"):
        seconds = getattr(row, name)
        if seconds is not None:
            getattr(job, name).FromMicroseconds(int(seconds * 1e6))
    return job
