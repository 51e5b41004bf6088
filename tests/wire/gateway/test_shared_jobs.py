# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Several gateways over one job database: each job runs once, and none is lost with its gateway."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from kubediffusion.errors import Unavailable
from kubediffusion.gateway.config import JobLimits
from kubediffusion.gateway.job_store import JobStore
from kubediffusion.gateway.jobs import Jobs
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2

QUEUED = gateway_pb2.JOB_STATE_QUEUED
RUNNING = gateway_pb2.JOB_STATE_RUNNING
SUCCEEDED = gateway_pb2.JOB_STATE_SUCCEEDED
FAILED = gateway_pb2.JOB_STATE_FAILED
CANCELLED = gateway_pb2.JOB_STATE_CANCELLED
# Beats are the tests' own.
LIMITS = JobLimits(beat=3600.0, lease=30.0, checkpoint_every=0.0, cancel_wait=0.0, running=2)
PLAN = b"plan"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Works:
    """What a gateway is to its jobs: images that come when `go` says so."""

    def __init__(self, name: str, ran: list[str], go: asyncio.Event) -> None:
        self.name, self.ran, self.go = name, ran, go
        self.resumed: list[int] = []
        self.stopped: list[str] = []

    async def check(self, request: gateway_pb2.GenerateRequest) -> None:
        pass

    def generate(self, request, checkpoints):
        async def events():
            self.ran.append(self.name)
            found = checkpoints.found(0, PLAN)
            self.resumed.append(found["denoise"].step if found else 0)
            checkpoints.keep(0, PLAN, "denoise", node_pb2.Checkpoint(step=5, total_steps=9))
            stepped = gateway_pb2.Stepped(step=5, total_steps=9)
            yield gateway_pb2.GenerateEvent(index=0, stepped=stepped)
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.stopped.append(request.workflow)
                raise
            yield gateway_pb2.GenerateEvent(index=0, image=gateway_pb2.Image(png=b"x"))

        return events()


class Town:
    """Gateways of one database; they vanish without a word when it is left."""

    def __init__(self, database: str) -> None:
        self.database, self.clock = database, Clock()
        self.ran: list[str] = []
        self.go = asyncio.Event()
        self.works: dict[str, Works] = {}
        self.jobs: dict[str, Jobs] = {}

    async def gateway(self, name: str, limits: JobLimits = LIMITS) -> Jobs:
        works = self.works[name] = Works(name, self.ran, self.go)
        jobs = self.jobs[name] = Jobs(works, self.database, limits, self.clock)
        await jobs.start()
        return jobs

    async def vanish(self, name: str) -> None:
        """As kill -9: nothing is written any more."""
        jobs = self.jobs.pop(name)
        await jobs._database.close()
        for run in list(jobs._active.values()):
            run.abandon()
        await jobs.stop()

    async def settle(self, jobs: Jobs) -> None:
        while jobs.active:
            await asyncio.wait([run.task for run in jobs._active.values() if run.task])

    async def begun(self, runs: int) -> None:
        async with asyncio.timeout(30):
            while len(self.ran) < runs:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@pytest.fixture
async def town(database: str) -> AsyncIterator[Town]:
    town = Town(database)
    yield town
    for jobs in list(town.jobs.values()):
        await jobs.stop()


def ask(key: str = "", workflow: str = "w", tenant: str = "") -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(workflow=workflow, idempotency_key=key, tenant=tenant)


@pytest.mark.parametrize("key", ["", "k"])
async def test_a_gateway_that_starts_leaves_alone_what_another_runs(town: Town, key: str) -> None:
    a = await town.gateway("a")
    job = await a.submit(ask(key))
    await town.begun(1)
    b = await town.gateway("b")
    await b.beat()
    assert (await b.get(job.id)).state == RUNNING
    town.go.set()
    await town.settle(a)
    done = await b.get(job.id)
    assert (done.state, len(done.images)) == (SUCCEEDED, 1)
    assert town.ran == ["a"]


async def test_a_job_is_kept_by_whoever_renews_it(town: Town) -> None:
    a, b = await town.gateway("a"), await town.gateway("b")
    await a.submit(ask())
    await town.begun(1)
    for _ in range(10):
        town.clock.now += LIMITS.lease * 0.9
        await a.beat()
        await b.beat()
    assert town.ran == ["a"]


async def test_what_a_gateway_left_goes_on_elsewhere_from_its_checkpoint(town: Town) -> None:
    a, b = await town.gateway("a"), await town.gateway("b")
    job = await a.submit(ask())
    await town.begun(1)
    async with asyncio.timeout(30):
        while not await kept(town.database):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await town.vanish("a")
    await b.beat()
    assert town.ran == ["a"]  # as far as anybody knows, it lives
    town.clock.now += LIMITS.lease + 1
    await b.beat()
    town.go.set()
    await town.settle(b)
    assert town.ran == ["a", "b"]
    assert town.works["b"].resumed == [5]
    assert (await b.get(job.id)).state == SUCCEEDED
    assert not await kept(town.database)


async def kept(database: str) -> int:
    """Checkpoints in it."""
    engine = sa.create_engine(database)
    with engine.connect() as db:
        count = db.execute(sa.text("SELECT count(*) FROM job_checkpoints")).scalar_one()
    engine.dispose()
    return count


async def test_a_gateway_that_was_taken_for_dead_does_no_harm(town: Town) -> None:
    a, b = await town.gateway("a"), await town.gateway("b")
    job = await a.submit(ask("k"))
    await town.begun(1)
    town.clock.now += LIMITS.lease + 1
    await b.beat()
    await town.begun(2)
    town.go.set()  # both of them come to an end
    await town.settle(a)
    await town.settle(b)
    done = await a.get(job.id)
    assert (done.state, len(done.images)) == (SUCCEEDED, 1)


async def test_a_gateway_stops_what_another_has_taken_over(town: Town) -> None:
    a, b = await town.gateway("a"), await town.gateway("b")
    await a.submit(ask(workflow="taken"))
    await town.begun(1)
    town.clock.now += LIMITS.lease + 1
    await b.beat()
    await town.begun(2)
    await a.beat()
    await town.settle(a)
    assert town.works["a"].stopped == ["taken"]
    assert b.active == 1


async def test_a_gateway_that_stops_hands_over_at_once(town: Town) -> None:
    a, b = await town.gateway("a"), await town.gateway("b")
    job = await a.submit(ask())
    await town.begun(1)
    await town.jobs.pop("a").stop()
    assert (await b.get(job.id)).state == QUEUED
    await b.beat()
    town.go.set()
    await town.settle(b)
    assert town.works["b"].resumed == [5]
    assert (await b.get(job.id)).state == SUCCEEDED


async def test_each_job_goes_to_one_of_the_gateways_that_reach_for_it(town: Town) -> None:
    a = await town.gateway("a", JobLimits(beat=3600.0, running=1, waiting=100))
    ids = [(await a.submit(ask())).id for _ in range(12)]
    others = [await town.gateway(name) for name in "bcd"]
    town.go.set()
    async with asyncio.timeout(60):
        while Counter([(await a.get(each)).state for each in ids])[SUCCEEDED] < 12:
            await asyncio.gather(*(each.beat() for each in [a, *others]))
    assert len(town.ran) == 12


async def test_any_gateway_cancels_any_job(town: Town) -> None:
    a, b = await town.gateway("a", JobLimits(beat=3600.0, running=1)), await town.gateway("b")
    await town.gateway("c")
    job = await a.submit(ask(workflow="mine"))
    await town.begun(1)
    assert (await b.cancel(job.id)).state == RUNNING  # until its owner hears of it
    await a.beat()
    await town.settle(a)
    assert (await b.get(job.id)).state == CANCELLED
    assert town.works["a"].stopped == ["mine"]


async def test_a_job_that_waits_is_cancelled_on_the_spot(town: Town) -> None:
    a = await town.gateway("a", JobLimits(beat=3600.0, running=1))
    await a.submit(ask())
    waits = await a.submit(ask())
    b = Jobs(Works("b", town.ran, town.go), town.database, LIMITS, town.clock)
    await b._database.open()
    town.jobs["b"] = b
    assert (await b.cancel(waits.id)).state == CANCELLED
    town.go.set()
    await town.settle(a)
    assert town.ran == ["a"]


async def test_a_cancelled_job_of_a_lost_gateway_is_not_run_again(town: Town) -> None:
    a, b = await town.gateway("a"), await town.gateway("b")
    job = await a.submit(ask())
    await town.begun(1)
    await b.cancel(job.id)
    await town.vanish("a")
    town.clock.now += LIMITS.lease + 1
    await b.beat()
    await town.settle(b)
    assert (await b.get(job.id)).state == CANCELLED
    assert town.ran == ["a"]


async def test_a_job_that_gateways_vanish_with_is_given_up(town: Town) -> None:
    limits = JobLimits(beat=3600.0, losses=2)
    a = await town.gateway("0", limits)
    job = await a.submit(ask())
    for number in range(1, 4):
        await town.begun(number)
        await town.vanish(str(number - 1))
        town.clock.now += limits.lease + 1
        a = await town.gateway(str(number), limits)
    await town.settle(a)
    done = await a.get(job.id)
    assert (done.state, done.reason) == (FAILED, "Interrupted")
    assert town.ran == ["0", "1", "2"]


async def test_two_gateways_make_one_job_of_one_key(town: Town) -> None:
    a, b = await town.gateway("a"), await town.gateway("b")
    made = await asyncio.gather(*(jobs.submit(ask("k")) for jobs in (a, b) for _ in range(3)))
    assert len({job.id for job in made}) == 1
    await town.begun(1)
    town.go.set()
    await town.settle(a)
    await town.settle(b)
    assert len(town.ran) == 1


async def test_gateways_may_start_on_an_empty_database_at_once(town: Town) -> None:
    await asyncio.gather(*(town.gateway(name) for name in "abcd"))


async def test_a_job_too_old_to_keep_goes_though_none_ends(town: Town) -> None:
    a = await town.gateway("a")
    town.go.set()
    job = await a.submit(ask())
    await town.settle(a)
    town.clock.now += LIMITS.seconds + 1
    for _ in range(30):
        await a.beat()
    assert not (await a.list(gateway_pb2.ListRequest())).jobs
    assert job.id


async def test_a_database_of_an_older_version_is_added_to(tmp_path) -> None:
    """As the first version made it, with a job in it that was never ended."""
    path = tmp_path / "old.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(OLD_SCHEMA)
        body = ask().SerializeToString()
        db.execute("INSERT INTO jobs VALUES (1,'job-1','w','','',2,1.0,1.0,NULL,0,0,'','',?,?,0)",
                   (b"", body))  # fmt: skip
        db.commit()
    town = Town(f"sqlite:///{path}")
    town.go.set()
    a = await town.gateway("a")
    await town.settle(a)
    assert (await a.get("job-1")).state == SUCCEEDED
    await a.stop()


OLD_SCHEMA = """
CREATE TABLE jobs (
    serial INTEGER NOT NULL, id VARCHAR(64) NOT NULL, workflow VARCHAR(253) NOT NULL,
    tenant VARCHAR(255) NOT NULL, idempotency_key VARCHAR(255) NOT NULL, state INTEGER NOT NULL,
    created FLOAT NOT NULL, started FLOAT, ended FLOAT, step INTEGER NOT NULL,
    total_steps INTEGER NOT NULL, reason VARCHAR(64) NOT NULL, message TEXT NOT NULL,
    body BLOB NOT NULL, request BLOB NOT NULL, image_bytes INTEGER NOT NULL,
    PRIMARY KEY (serial), UNIQUE (id)
);
CREATE INDEX jobs_by_key ON jobs (tenant, idempotency_key);
CREATE INDEX ix_jobs_workflow ON jobs (workflow);
CREATE INDEX ix_jobs_state ON jobs (state);
CREATE TABLE job_images (
    job VARCHAR(64) NOT NULL, number INTEGER NOT NULL, image BLOB NOT NULL,
    PRIMARY KEY (job, number)
);
"""


class Faulty:
    """A JobStore whose calls fail so many times."""

    def __init__(self, store: JobStore, failures: int) -> None:
        self.store, self.failures = store, failures

    def __getattr__(self, name: str):
        if self.failures and name != "close":
            self.failures -= 1
            raise OperationalError("SELECT 1", {"secret": "hunter2"}, Exception("gone away"))
        return getattr(self.store, name)


def break_database(jobs: Jobs, failures: int) -> None:
    async def at_once(seconds: float) -> None:
        pass

    database = jobs._database
    assert database._store is not None
    database._store = Faulty(database._store, failures)  # type: ignore[assignment]
    database._sleep = at_once


async def test_a_database_that_is_away_for_a_moment_costs_nothing(town: Town) -> None:
    a = await town.gateway("a")
    job = await a.submit(ask())
    await town.begun(1)
    break_database(a, 3)
    town.go.set()
    await town.settle(a)
    assert (await a.get(job.id)).state == SUCCEEDED


async def test_a_job_whose_end_could_not_be_written_runs_again(town: Town) -> None:
    a = await town.gateway("a")
    job = await a.submit(ask())
    await town.begun(1)
    break_database(a, 1000)
    town.go.set()
    await town.settle(a)
    with pytest.raises(Unavailable) as caught:
        await a.get(job.id)
    assert caught.value.reason == "JobDatabase"
    assert "gone away" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    a._database._store.failures = 0  # type: ignore[union-attr]
    town.clock.now += LIMITS.lease + 1
    await a.beat()
    await town.settle(a)
    assert (await a.get(job.id)).state == SUCCEEDED


async def test_a_database_without_its_driver_says_so() -> None:
    jobs = Jobs(None, "postgresql+nosuch://x@y/z", LIMITS)  # type: ignore[arg-type]
    with pytest.raises(Unavailable) as caught:
        await jobs.start()
    assert "job_database" in str(caught.value)
