# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs in a database. Everything here blocks: `jobs.Jobs` calls it from one worker thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

from kubediffusion.errors import Unavailable
from kubediffusion.gateway.config import JobLimits
from kubediffusion.v1alpha1 import gateway_pb2

ENDED = (
    gateway_pb2.JOB_STATE_SUCCEEDED,
    gateway_pb2.JOB_STATE_FAILED,
    gateway_pb2.JOB_STATE_CANCELLED,
)

_metadata = sa.MetaData()
_jobs = sa.Table(
    "jobs",
    _metadata,
    # Rises with each job, so that pages stay in order whatever the clock does.
    sa.Column("serial", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(64), unique=True, nullable=False),
    sa.Column("workflow", sa.String(253), nullable=False, index=True),
    sa.Column("tenant", sa.String(255), nullable=False),
    sa.Column("idempotency_key", sa.String(255), nullable=False),
    sa.Column("state", sa.Integer, nullable=False, index=True),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("started", sa.Float),
    sa.Column("ended", sa.Float),
    sa.Column("step", sa.Integer, nullable=False, default=0),
    sa.Column("total_steps", sa.Integer, nullable=False, default=0),
    sa.Column("reason", sa.String(64), nullable=False, default=""),
    sa.Column("message", sa.Text, nullable=False, default=""),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("request", sa.LargeBinary, nullable=False),
    sa.Column("image_bytes", sa.Integer, nullable=False, default=0),
    sa.Index("jobs_by_key", "tenant", "idempotency_key"),
)
_images = sa.Table(
    "job_images",
    _metadata,
    sa.Column("job", sa.String(64), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("image", sa.LargeBinary, nullable=False),
)


@dataclass(frozen=True, slots=True)
class NewJob:
    id: str
    request: gateway_pb2.GenerateRequest
    # Two requests with one idempotency key are one job only if this is equal.
    body: bytes
    created: float


class JobStore:
    def __init__(self, url: str, limits: JobLimits) -> None:
        self._limits = limits
        in_memory = url in ("sqlite://", "sqlite:///:memory:")
        try:
            self._engine = (
                # One connection, or each thread would see a database of its own.
                sa.create_engine(
                    url, poolclass=StaticPool, connect_args={"check_same_thread": False}
                )
                if in_memory
                else sa.create_engine(url)
            )
            _metadata.create_all(self._engine)
        except SQLAlchemyError as error:
            raise Unavailable(
                f"the job database {sa.engine.make_url(url)!r} cannot be opened: {error}",
                field="job_database",
            ) from error

    def close(self) -> None:
        self._engine.dispose()

    def interrupted(self) -> list[NewJob]:
        """Jobs that a gateway left unfinished: those with a key run again, others have failed.

        A key says that running twice is the same as running once.
        """
        unfinished = _jobs.c.state.not_in(ENDED)
        with self._engine.begin() as db:
            db.execute(
                _jobs.update()
                .where(unfinished, _jobs.c.idempotency_key == "")
                .values(
                    state=gateway_pb2.JOB_STATE_FAILED,
                    ended=_jobs.c.created,
                    reason="Interrupted",
                    message="the gateway stopped before the job was done; submit it again "
                    "(one with an idempotency key is run again by itself)",
                    request=b"",
                )
            )
            db.execute(
                _jobs.update()
                .where(unfinished)
                .values(state=gateway_pb2.JOB_STATE_QUEUED, started=None, step=0)
            )
            rows = db.execute(_jobs.select().where(unfinished).order_by(_jobs.c.serial)).all()
            for row in rows:
                db.execute(_images.delete().where(_images.c.job == row.id))
        return [
            NewJob(
                row.id,
                gateway_pb2.GenerateRequest.FromString(row.request),
                row.body,
                row.created,
            )
            for row in rows
        ]

    def add(self, job: NewJob) -> None:
        request = job.request
        with self._engine.begin() as db:
            db.execute(
                _jobs.insert().values(
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

    def by_key(self, tenant: str, key: str) -> tuple[gateway_pb2.Job, bytes] | None:
        """The youngest job with that key that has not failed, and its body's digest."""
        failed = (gateway_pb2.JOB_STATE_FAILED, gateway_pb2.JOB_STATE_CANCELLED)
        query = (
            _jobs.select()
            .where(
                _jobs.c.tenant == tenant,
                _jobs.c.idempotency_key == key,
                _jobs.c.state.not_in(failed),
            )
            .order_by(_jobs.c.serial.desc())
        )
        with self._engine.connect() as db:
            row = db.execute(query).first()
        return None if row is None else (_to_job(row), row.body)

    def update(self, job_id: str, **values: object) -> None:
        with self._engine.begin() as db:
            db.execute(_jobs.update().where(_jobs.c.id == job_id).values(**values))

    def finish(
        self,
        job_id: str,
        state: gateway_pb2.JobState,
        ended: float,
        *,
        reason: str = "",
        message: str = "",
        images: Sequence[gateway_pb2.Image] = (),
    ) -> None:
        """The end of a job, with its images, in one transaction; then old ones make room."""
        blobs = [image.SerializeToString() for image in images]
        with self._engine.begin() as db:
            db.execute(
                _jobs.update()
                .where(_jobs.c.id == job_id)
                .values(
                    state=state,
                    ended=ended,
                    reason=reason,
                    message=message,
                    request=b"",  # uploads need not be kept
                    image_bytes=sum(map(len, blobs)),
                )
            )
            for number, blob in enumerate(blobs):
                db.execute(_images.insert().values(job=job_id, number=number, image=blob))
        self.make_room(ended)

    def make_room(self, now: float) -> None:
        """Drops ended jobs, oldest first, that are too old, too many or too large together."""
        limits = self._limits
        ended = _jobs.c.state.in_(ENDED)
        query = (
            sa.select(_jobs.c.id, _jobs.c.ended, _jobs.c.image_bytes)
            .where(ended)
            .order_by(_jobs.c.serial.desc())
        )
        with self._engine.begin() as db:
            kept, nbytes, old = 0, 0, []
            for row in db.execute(query):
                kept, nbytes = kept + 1, nbytes + row.image_bytes
                too_old = row.ended is not None and row.ended < now - limits.seconds
                if too_old or kept > limits.count or nbytes > limits.image_bytes:
                    old.append(row.id)
            for job_id in old:
                db.execute(_images.delete().where(_images.c.job == job_id))
                db.execute(_jobs.delete().where(_jobs.c.id == job_id))

    def ended(self) -> dict[int, int]:
        """Ended jobs by state."""
        query = sa.select(_jobs.c.state, sa.func.count()).group_by(_jobs.c.state)
        with self._engine.connect() as db:
            counts = {row[0]: row[1] for row in db.execute(query)}
        return {state: counts.get(state, 0) for state in ENDED}

    def get(self, job_id: str) -> gateway_pb2.Job | None:
        """With its images."""
        with self._engine.connect() as db:
            row = db.execute(_jobs.select().where(_jobs.c.id == job_id)).first()
            if row is None:
                return None
            job = _to_job(row)
            query = _images.select().where(_images.c.job == job_id).order_by(_images.c.number)
            for image in db.execute(query):
                job.images.append(gateway_pb2.Image.FromString(image.image))
        return job

    def page(
        self,
        size: int,
        before: int | None,
        workflow: str,
        tenant: str,
        states: Sequence[gateway_pb2.JobState],
    ) -> tuple[list[gateway_pb2.Job], int | None]:
        """Youngest first, without images; and the serial that the next page begins before."""
        query = _jobs.select().order_by(_jobs.c.serial.desc()).limit(size + 1)
        if before is not None:
            query = query.where(_jobs.c.serial < before)
        if workflow:
            query = query.where(_jobs.c.workflow == workflow)
        if tenant:
            query = query.where(_jobs.c.tenant == tenant)
        if states:
            query = query.where(_jobs.c.state.in_(list(states)))
        with self._engine.connect() as db:
            rows = db.execute(query).all()
        more = rows[size - 1].serial if len(rows) > size else None
        return [_to_job(row) for row in rows[:size]], more


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
