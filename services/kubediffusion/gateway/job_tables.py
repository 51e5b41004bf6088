# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of the job store, made where they are missing and added to where they are older.

Changes are additive, so that gateways of two versions can share a database during an update: new
columns have a default on the server, and nothing is renamed or dropped.
"""

from __future__ import annotations

import logging

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.pool import StaticPool

from kubediffusion.v1alpha1 import gateway_pb2

log = logging.getLogger(__name__)

IN_MEMORY = ("sqlite://", "sqlite:///:memory:")
ENDED = (
    gateway_pb2.JOB_STATE_SUCCEEDED,
    gateway_pb2.JOB_STATE_FAILED,
    gateway_pb2.JOB_STATE_CANCELLED,
)
# Of these a key may name another job.
FAILED = (gateway_pb2.JOB_STATE_FAILED, gateway_pb2.JOB_STATE_CANCELLED)
# How often making the tables is tried: gateways that start at once get in each other's way.
_ATTEMPTS = 5

metadata = sa.MetaData()
jobs = sa.Table(
    "jobs",
    metadata,
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
    # The gateway that runs it, until when that counts, and its fence: whoever takes a job over
    # raises the epoch, and writes of an older one change nothing.
    sa.Column("owner", sa.String(64), nullable=False, server_default=""),
    sa.Column("lease_until", sa.Float),
    sa.Column("epoch", sa.Integer, nullable=False, server_default="0"),
    # How often a gateway vanished with it.
    sa.Column("losses", sa.Integer, nullable=False, server_default="0"),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Index("jobs_by_key", "tenant", "idempotency_key"),
    sa.Index("jobs_by_owner", "owner"),
)
_has_key = sa.and_(jobs.c.idempotency_key != "", jobs.c.state.not_in(FAILED))
# Two gateways that are handed one key at once make one job.
sa.Index(
    "jobs_one_by_key",
    jobs.c.tenant,
    jobs.c.idempotency_key,
    unique=True,
    sqlite_where=_has_key,
    postgresql_where=_has_key,
)
images = sa.Table(
    "job_images",
    metadata,
    sa.Column("job", sa.String(64), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("image", sa.LargeBinary, nullable=False),
    # Where its bytes are, if not in `image` (see `job_results`).
    sa.Column("name", sa.String(255), nullable=False, server_default=""),
)
checkpoints = sa.Table(
    "job_checkpoints",
    metadata,
    sa.Column("job", sa.String(64), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("task", sa.String(255), primary_key=True),
    # What it is a checkpoint of (see `gateway.checkpoints`): of anything else it is worthless.
    sa.Column("plan", sa.LargeBinary, nullable=False),
    sa.Column("checkpoint", sa.LargeBinary, nullable=False),
)


def open_engine(url: str) -> sa.Engine:
    """An engine whose database has all tables. Raises SQLAlchemyError, or ImportError for a
    database whose driver is not installed."""
    if url in IN_MEMORY:
        # One connection, or each thread would see a database of its own.
        engine = sa.create_engine(
            url, poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
    else:
        # A database that was restarted, or failed over, has closed the connections of the pool.
        engine = sa.create_engine(url, pool_pre_ping=True)
    for attempt in range(_ATTEMPTS):
        try:
            _make(engine)
            break
        except DBAPIError:
            if attempt == _ATTEMPTS - 1:
                engine.dispose()
                raise
    return engine


def _make(engine: sa.Engine) -> None:
    metadata.create_all(engine)
    for table in (jobs, images):
        there = {column["name"] for column in sa.inspect(engine).get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                definition = sa.schema.CreateColumn(column).compile(dialect=engine.dialect)
                with engine.begin() as db:
                    db.execute(sa.DDL(f"ALTER TABLE {table.name} ADD COLUMN {definition}"))
    for index in jobs.indexes:
        try:
            index.create(engine, checkfirst=True)
        except IntegrityError:
            log.warning(
                "the job database holds several jobs with one idempotency key; until they have "
                "gone, two gateways may make two jobs of one key"
            )
