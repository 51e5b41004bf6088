# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Images of jobs in a folder and in a bucket (of a server that speaks S3), not in the database."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import fsspec
import pytest

from kubediffusion.errors import Unavailable
from kubediffusion.gateway.config import JobLimits
from kubediffusion.gateway.job_results import JobResults
from kubediffusion.gateway.jobs import Jobs
from kubediffusion.v1alpha1 import gateway_pb2
from tests.cluster.kube import NoPrograms, programs

SUCCEEDED = gateway_pb2.JOB_STATE_SUCCEEDED
LIMITS = JobLimits(beat=3600.0, checkpoint_every=0.0, running=2)
PICTURES = [b"first " * 100, b"second " * 100]


class Draws:
    """What a gateway is to its jobs: two pictures, at once or once `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.begun = asyncio.Event()

    async def check(self, request: gateway_pb2.GenerateRequest) -> None:
        pass

    def generate(self, request, checkpoints):
        async def events():
            self.begun.set()
            await self.go.wait()
            for index, png in enumerate(PICTURES):
                image = gateway_pb2.Image(png=png, width=8, seed=index, warnings=["cut"])
                yield gateway_pb2.GenerateEvent(index=index, image=image)

        return events()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Of a real server, in its memory."""
    try:
        program = Path(programs("gofakes3").rpartition(":")[2]) / "gofakes3"
    except NoPrograms as error:
        if os.environ.get("CI"):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(f"NOT TESTED, FOR WANT OF gofakes3: {error}")
    port = free_port()
    address = f"127.0.0.1:{port}"
    command = [program, "-backend", "memory", "-host", address, "-initialbucket", "pictures"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ends = time.monotonic() + 60
        while not listens(port):
            assert server.poll() is None
            assert time.monotonic() < ends
            time.sleep(0.02)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
            patch.setenv("AWS_ACCESS_KEY_ID", "key")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            patch.setenv("AWS_REGION", "us-east-1")
            patch.setenv("AWS_ALLOW_HTTP", "true")
            yield "s3://pictures/jobs"
    finally:
        server.kill()
        server.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(params=["folder", "bucket"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "bucket":
        return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    return f"file://{tmp_path}/results"


def files(url: str) -> list[str]:
    """Below `url`, relative to it."""
    system, root = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    names = (name.removeprefix(f"{root}/") for name in system.find(root))
    return sorted(name for name in names if name != ".writable")


class Service:
    """Gateways' jobs over one database and one place for results."""

    def __init__(self, folder: Path, url: str) -> None:
        self.database = folder / "jobs.db"
        self.url = url
        self.now = 1000.0
        self.open: list[Jobs] = []

    async def jobs(self, draws: Draws, limits: JobLimits = LIMITS, url: str | None = None) -> Jobs:
        jobs = Jobs(
            draws,
            f"sqlite:///{self.database}",
            limits,
            lambda: self.now,
            results=self.url if url is None else url,
        )
        await jobs.start()
        self.open.append(jobs)
        return jobs

    async def done(self, jobs: Jobs, job_id: str) -> gateway_pb2.Job:
        async with asyncio.timeout(60):
            while run := jobs._active.get(job_id):
                await asyncio.wait([run.task])
        return await jobs.get(job_id)


@pytest.fixture
async def service(tmp_path: Path, url: str) -> AsyncIterator[Service]:
    service = Service(tmp_path, url)
    yield service
    for jobs in service.open:
        await jobs.stop()


def ask() -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(workflow="w", n=2)


async def test_images_lie_there_and_come_back_whole_also_through_another_gateway(
    service: Service,
) -> None:
    one, other = await service.jobs(Draws()), await service.jobs(Draws())
    job = await service.done(one, (await one.submit(ask())).id)
    assert job.state == SUCCEEDED
    assert files(service.url) == [f"{job.id}/1/0.png", f"{job.id}/1/1.png"]
    there = await other.get(job.id)
    assert [image.png for image in there.images] == PICTURES
    assert [(i.width, i.seed, list(i.warnings)) for i in there.images] == [
        (8, 0, ["cut"]),
        (8, 1, ["cut"]),
    ]
    # And not in the database, which still knows what they take.
    rows = sqlite3.connect(service.database)
    assert rows.execute("select max(length(image)) from job_images").fetchone()[0] < 100
    assert rows.execute("select image_bytes from jobs").fetchone()[0] > sum(map(len, PICTURES))
    rows.close()


async def test_images_go_with_their_job(service: Service) -> None:
    jobs = await service.jobs(Draws(), JobLimits(beat=3600.0, running=2, count=1))
    first = await service.done(jobs, (await jobs.submit(ask())).id)
    second = await service.done(jobs, (await jobs.submit(ask())).id)
    assert first.id != second.id
    assert {name.split("/")[0] for name in files(service.url)} == {second.id}


async def test_a_run_that_was_taken_over_leaves_nothing(service: Service) -> None:
    slow, quick = Draws(), Draws()
    slow.go.clear()
    one = await service.jobs(slow)
    job = await one.submit(ask())
    async with asyncio.timeout(60):
        await slow.begun.wait()
    service.now += 2 * LIMITS.lease  # cut off: its lease has lapsed
    other = await service.jobs(quick)
    await service.done(other, job.id)
    slow.go.set()
    late = await service.done(one, job.id)
    assert late.state == SUCCEEDED
    assert files(service.url) == [f"{job.id}/2/0.png", f"{job.id}/2/1.png"]


async def test_an_image_that_somebody_removed_is_told(service: Service) -> None:
    jobs = await service.jobs(Draws())
    job = await service.done(jobs, (await jobs.submit(ask())).id)
    JobResults(service.url).remove(job.id)
    fsspec.core.url_to_fs(service.url)[0].invalidate_cache()
    with pytest.raises(Unavailable, match="removed by somebody else"):
        await jobs.get(job.id)


async def test_a_gateway_that_was_not_told_of_the_place_says_so(service: Service) -> None:
    one = await service.jobs(Draws())
    job = await service.done(one, (await one.submit(ask())).id)
    without = await service.jobs(Draws(), url="")
    with pytest.raises(Unavailable, match="set job_results"):
        await without.get(job.id)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nowhere://bucket", "nowhere"),
        ("file:///proc/no/such/folder", "cannot be opened"),
        ("s3://no-such-bucket/jobs", "cannot be opened"),
    ],
)
async def test_a_place_that_cannot_be_is_refused_at_the_start(
    tmp_path: Path, url: str, says: str, bucket: str
) -> None:
    jobs = Jobs(Draws(), f"sqlite:///{tmp_path}/jobs.db", LIMITS, results=url)
    with pytest.raises(Unavailable, match=says):
        await jobs.start()
