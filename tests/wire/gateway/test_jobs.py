# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs: submitted, watched, cancelled, kept within bounds, and found again after a restart."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from gateways import (
    CONFIG,
    assert_empty,
    events_of,
    gateway_over,
    images,
    one_node,
    request,
    workflow,
)

from kubediffusion.errors import Conflict, InvalidInput, NotFound, Overloaded
from kubediffusion.gateway.config import JobLimits
from kubediffusion.v1alpha1 import gateway_pb2

ENDED = {
    gateway_pb2.JOB_STATE_SUCCEEDED,
    gateway_pb2.JOB_STATE_FAILED,
    gateway_pb2.JOB_STATE_CANCELLED,
}


async def ended(gateway, job_id: str) -> gateway_pb2.Job:
    run = gateway.jobs._active.get(job_id)
    if run is not None:
        await asyncio.wait([run.task], timeout=60)
    job = await gateway.jobs.get(job_id)
    assert job.state in ENDED
    return job


async def arrived(gateway, job_id: str) -> None:
    """The checkpoint that the node has sent."""
    async with asyncio.timeout(60):
        while not gateway.jobs._active[job_id].checkpoints._kept:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_job_gives_the_same_image_as_a_stream(tmp_path):
    async with gateway_over([one_node(tmp_path)]) as gateway:
        submitted = await gateway.jobs.submit(request(tenant="t"))
        assert submitted.state in (
            gateway_pb2.JOB_STATE_QUEUED,
            gateway_pb2.JOB_STATE_RUNNING,
            gateway_pb2.JOB_STATE_SUCCEEDED,
        )
        job = await ended(gateway, submitted.id)
        assert job.state == gateway_pb2.JOB_STATE_SUCCEEDED
        assert list(job.images) == images(await events_of(gateway, request()))
        assert (job.step, job.total_steps, job.tenant) == (8, 8, "t")
        assert job.created.seconds <= job.started.seconds <= job.ended.seconds
        assert_empty(gateway)


async def test_a_wrong_request_is_refused_when_it_is_submitted(tmp_path):
    async with gateway_over([one_node(tmp_path)]) as gateway:
        with pytest.raises(InvalidInput):
            await gateway.jobs.submit(request(steps=0))
        with pytest.raises(NotFound):
            await gateway.jobs.submit(request(workflow="nope"))
        assert not (await gateway.jobs.list(gateway_pb2.ListRequest())).jobs


async def test_a_cancelled_job_stops_and_stays_cancelled(tmp_path):
    never = asyncio.Event()
    node = one_node(tmp_path, script=lambda node, assign, step: never.wait() if step == 1 else None)
    async with gateway_over([node]) as gateway:
        job = await gateway.jobs.submit(request())
        await node.until(lambda: any(a.stage == "denoise" for a in node.assigned))
        cancelled = await gateway.jobs.cancel(job.id)
        assert cancelled.state == gateway_pb2.JOB_STATE_CANCELLED
        assert (await gateway.jobs.cancel(job.id)).state == gateway_pb2.JOB_STATE_CANCELLED
        assert_empty(gateway)
        with pytest.raises(NotFound):
            await gateway.jobs.cancel("nope")


async def test_jobs_are_listed_youngest_first_in_pages(tmp_path):
    async with gateway_over([one_node(tmp_path)]) as gateway:
        ids = []
        for number in range(5):
            job = await gateway.jobs.submit(request(seed=number, tenant=f"t{number % 2}"))
            ids.append(job.id)
            await ended(gateway, job.id)
        found: list[str] = []
        token = ""
        while True:
            page = await gateway.jobs.list(gateway_pb2.ListRequest(page_size=2, page_token=token))
            assert len(page.jobs) <= 2
            assert not any(job.images for job in page.jobs)
            found += [job.id for job in page.jobs]
            token = page.next_page_token
            if not token:
                break
        assert found == ids[::-1]
        mine = await gateway.jobs.list(gateway_pb2.ListRequest(tenant="t1"))
        assert [job.id for job in mine.jobs] == [ids[3], ids[1]]
        failed = gateway_pb2.ListRequest(states=[gateway_pb2.JOB_STATE_FAILED])
        assert not (await gateway.jobs.list(failed)).jobs
        with pytest.raises(InvalidInput):
            await gateway.jobs.list(gateway_pb2.ListRequest(page_token="x; drop table"))


async def test_a_key_names_one_job(tmp_path):
    async with gateway_over([one_node(tmp_path)]) as gateway:
        keyed = request(idempotency_key="k")
        both = await asyncio.gather(gateway.jobs.submit(keyed), gateway.jobs.submit(keyed))
        assert both[0].id == both[1].id
        with pytest.raises(Conflict):
            await gateway.jobs.submit(request(idempotency_key="k", prompt="another"))


async def test_what_is_kept_is_bounded(tmp_path):
    config = replace(CONFIG, jobs=JobLimits(count=2, running=1, waiting=1))
    go = asyncio.Event()
    node = one_node(tmp_path, script=lambda node, assign, step: go.wait() if step == 0 else None)
    async with gateway_over([node], config=config) as gateway:
        first = await gateway.jobs.submit(request(seed=1))
        second = await gateway.jobs.submit(request(seed=2))
        with pytest.raises(Overloaded):
            await gateway.jobs.submit(request(seed=3))
        go.set()
        await ended(gateway, first.id)
        await ended(gateway, second.id)
        third = await gateway.jobs.submit(request(seed=3))
        await ended(gateway, third.id)
        with pytest.raises(NotFound):
            await gateway.jobs.get(first.id)
        kept = (await gateway.jobs.list(gateway_pb2.ListRequest())).jobs
        assert [job.id for job in kept] == [third.id, second.id]


@pytest.mark.parametrize("key", ["", "k"])
async def test_after_a_restart_a_job_goes_on_from_its_checkpoint(tmp_path, key):
    """A job was promised, so it needs no key; and its seed is the same, even if nobody chose it."""
    limits = JobLimits(checkpoint_every=0.0)
    config = replace(CONFIG, job_database=f"sqlite:///{tmp_path}/jobs.db", jobs=limits)
    never = asyncio.Event()
    node = one_node(tmp_path, script=lambda node, assign, step: never.wait() if step == 6 else None)
    async with gateway_over([node], config=config) as gateway:
        job = await gateway.jobs.submit(request(seed=None, idempotency_key=key))
        await node.until(lambda: max(node.steps.values(), default=0) == 6)
        await arrived(gateway, job.id)
        seen = request(seed=None, idempotency_key=key or job.id)
    other = one_node(tmp_path, "b")
    async with gateway_over([other], config=config) as gateway:
        done = await ended(gateway, job.id)
        assert done.state == gateway_pb2.JOB_STATE_SUCCEEDED
        assert list(other.steps.values()) == [4]  # the checkpoint was taken after 4 of 8
        assert list(done.images) == images(await events_of(gateway, seen))


async def test_a_checkpoint_of_another_workflow_is_not_gone_on_from(tmp_path):
    limits = JobLimits(checkpoint_every=0.0)
    config = replace(CONFIG, job_database=f"sqlite:///{tmp_path}/jobs.db", jobs=limits)
    never = asyncio.Event()
    node = one_node(tmp_path, script=lambda node, assign, step: never.wait() if step == 6 else None)
    async with gateway_over([node], config=config) as gateway:
        job = await gateway.jobs.submit(request())
        await node.until(lambda: max(node.steps.values(), default=0) == 6)
        await arrived(gateway, job.id)
    fast = replace(workflow(), numerics="fast")
    other = one_node(tmp_path, "b")
    async with gateway_over([other], {"sd3": fast}, config=config) as gateway:
        assert (await ended(gateway, job.id)).state == gateway_pb2.JOB_STATE_SUCCEEDED
        assert list(other.steps.values()) == [8]
