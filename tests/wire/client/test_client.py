# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The client against a gateway of real gRPC; each test runs through both faces of the client."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PillowImage
from scripted_gateway import WAIT, FakeGateway, event, finished, image, png, serving, stepped

from kubediffusion import errors
from kubediffusion.client import (
    AsyncClient,
    Client,
    Event,
    Finished,
    Image,
    JobState,
    Preview,
    Queued,
    Resumed,
    Started,
    Stepped,
)
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2, tensor_pb2

SECONDS = 120


class AsyncFace:
    """`AsyncClient`, as the tests drive either."""

    def __init__(self, address: str, **options: Any) -> None:
        self.client = AsyncClient(address, **options)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return await getattr(self.client, method)(*args, **kwargs)

    async def collect(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return [item async for item in getattr(self.client, method)(*args, **kwargs)]

    async def take_and_leave(self, count: int, *args: Any, **kwargs: Any) -> list[Event]:
        taken: list[Event] = []
        async with aclosing(self.client.generate(*args, **kwargs)) as events:
            async for each in events:
                taken.append(each)
                if len(taken) == count:
                    break
        return taken

    async def close(self) -> None:
        await self.client.close()


class SyncFace:
    """`Client`, in a thread, since the fake gateway has this loop."""

    def __init__(self, address: str, **options: Any) -> None:
        self.client = Client(address, **options)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(getattr(self.client, method), *args, **kwargs)

    async def collect(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return await asyncio.to_thread(lambda: list(getattr(self.client, method)(*args, **kwargs)))

    async def take_and_leave(self, count: int, *args: Any, **kwargs: Any) -> list[Event]:
        def take() -> list[Event]:
            events = self.client.generate(*args, **kwargs)
            taken = [next(events) for _ in range(count)]
            events.close()
            return taken

        return await asyncio.to_thread(take)

    async def close(self) -> None:
        self.client.close()


Face = AsyncFace | SyncFace


@pytest.fixture(params=[AsyncFace, SyncFace], ids=["async", "sync"])
def face_type(request: pytest.FixtureRequest) -> type[Face]:
    return request.param


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
async def face(face_type: type[Face], gateway: FakeGateway) -> AsyncIterator[Face]:
    async with asyncio.timeout(SECONDS), serving(gateway) as address:
        face = face_type(address, tenant="acme")
        yield face
        await face.close()


async def test_every_event_comes_out_typed_and_in_order(face: Face, gateway: FakeGateway) -> None:
    timing = node_pb2.Timing(queue_seconds=0.1, fetch_seconds=0.2, run_seconds=0.3, steps_run=4)
    stage = gateway_pb2.StageTime(
        index=0,
        task="denoise",
        stage="denoise",
        node="n",
        timing=timing,
        total_seconds=0.7,
        attempts=2,
    )
    preview = gateway_pb2.Image(png=png("blue"), width=4, height=3, seed=7, step=2)
    gateway.plays = [
        [
            event(queued=gateway_pb2.Queued(cold=True, ahead=3)),
            event(started=gateway_pb2.Started(stage="denoise", node="n")),
            stepped(1),
            event(preview=preview),
            event(resumed=gateway_pb2.Resumed(stage="denoise", from_step=1, reason="NodeLost")),
            image(),
            event(finished=gateway_pb2.Finished(seconds=1.5, stages=[stage])),
        ]
    ]
    queued, started, step, rough, resumed, done, end = await face.collect("generate", "sd3")
    assert queued == Queued("r", 0, cold=True, ahead=3)
    assert started == Started("r", 0, stage="denoise", node="n")
    assert step == Stepped("r", 0, step=1, total_steps=4)
    assert rough == Preview("r", 0, png("blue"), 4, 3, 7, step=2)
    assert resumed == Resumed("r", 0, stage="denoise", from_step=1, reason="NodeLost")
    assert done == Image("r", 0, png("red"), 4, 3, 7)
    assert isinstance(end, Finished)
    assert end.seconds == 1.5
    (time,) = end.stages
    assert (time.task, time.node, time.steps, time.attempts) == ("denoise", "n", 4, 2)
    assert (time.queue_seconds, time.run_seconds, time.total_seconds) == (0.1, 0.3, 0.7)


async def test_a_request_says_what_the_caller_asked_for(
    face: Face, gateway: FakeGateway, tmp_path: Path
) -> None:
    gateway.plays = [[finished()]]
    (tmp_path / "edges.png").write_bytes(png("white"))
    await face.collect(
        "generate",
        "sd3",
        prompt="a cat",
        seed=7,
        guidance=4.5,
        image=PillowImage.new("RGB", (4, 3), "red"),
        control={"edges": tmp_path / "edges.png", "edges.scale": 0.7},
        inputs={"n": 3, "tiled": True},
        n=2,
        loras={"ink": 0.8},
        previews=3,
        deadline=60,
        idempotency_key="k",
        numerics="fast",
        budget=0.6,
        priority=-1,
        steps=None,
    )
    (request,) = gateway.requests
    inputs = {name: value.WhichOneof("kind") for name, value in request.inputs.items()}
    assert inputs == {
        "prompt": "text",
        "seed": "integer",
        "guidance": "number",
        "image": "blob",
        "control.edges": "blob",
        "control.edges.scale": "number",
        "n": "integer",
        "tiled": "flag",
    }
    assert request.inputs["image"].blob == png("red")
    assert request.inputs["control.edges"].blob == png("white")
    assert (request.workflow, request.n, request.previews) == ("sd3", 2, 3)
    assert dict(request.loras) == {"ink": 0.8}
    assert 59_000 < request.deadline_ms <= 60_000
    assert (request.idempotency_key, request.tenant) == ("k", "acme")
    assert (request.numerics, request.budget, request.priority) == (2, 0.6, -1)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"n": -1}, "n"),
        ({"n": "two"}, "n"),
        ({"loras": {"ink": "much"}}, "loras.ink"),
        ({"numerics": "sloppy"}, "numerics"),
        ({"deadline": float("inf")}, "deadline"),
        ({"seed": 2**64}, "inputs.seed"),
        ({"style": object()}, "inputs.style"),
    ],
)
async def test_what_cannot_be_sent_is_refused_by_name(
    face: Face, gateway: FakeGateway, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(errors.InvalidInput) as info:
        await face.collect("generate", "sd3", **options)
    assert info.value.field == field
    assert gateway.requests == []


async def test_image_gives_the_picture_and_its_bytes(
    face: Face, gateway: FakeGateway, tmp_path: Path
) -> None:
    gateway.plays = [[stepped(1), image(color="blue"), finished()]]
    picture = await face.call("image", "sd3", prompt="x")
    assert picture.pil().getpixel((0, 0)) == (0, 0, 255)
    picture.save(tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes() == png("blue")


async def test_images_come_in_the_order_of_their_seeds(face: Face, gateway: FakeGateway) -> None:
    gateway.plays = [[image(2, seed=9), image(0, seed=7), image(1, seed=8), finished()]]
    pictures = await face.call("images", "sd3", n=3)
    assert [picture.seed for picture in pictures] == [7, 8, 9]


async def test_an_error_of_the_gateway_is_raised_as_its_class_and_not_tried_again(
    face: Face, gateway: FakeGateway
) -> None:
    gateway.plays = [
        [stepped(1), errors.InvalidInput("must be a multiple of 16", field="inputs.width")]
    ]
    with pytest.raises(errors.InvalidInput, match="multiple of 16") as info:
        await face.call("image", "sd3", width=33)
    assert info.value.field == "inputs.width"
    assert len(gateway.requests) == 1


async def test_overload_says_when_to_come_again(face: Face, gateway: FakeGateway) -> None:
    gateway.plays = [[errors.Overloaded("12 wait", retry_after=2.5)]]
    with pytest.raises(errors.Overloaded) as info:
        await face.call("image", "sd3")
    assert info.value.retry_after == 2.5


async def test_a_request_cancelled_over_there_is_our_cancelled(
    face: Face, gateway: FakeGateway
) -> None:
    gateway.plays = [[stepped(1), errors.Cancelled("by an operator")]]
    with pytest.raises(errors.Cancelled, match="operator"):
        await face.call("image", "sd3")


async def test_a_lost_connection_goes_on_by_its_key_and_no_event_comes_twice(
    face: Face, gateway: FakeGateway
) -> None:
    lost = errors.Unavailable("gateway is stopping")
    started = event(started=gateway_pb2.Started(stage="denoise", node="n"))
    gateway.plays = [
        [started, stepped(1), stepped(2), image(0), lost],
        [lost],
        [started, stepped(1), stepped(2), stepped(3), image(0), image(1), finished()],
    ]
    events = await face.collect("generate", "sd3", n=2, deadline=60)
    steps = [each.step for each in events if isinstance(each, Stepped)]
    images = [each.index for each in events if isinstance(each, Image)]
    assert (steps, images) == ([1, 2, 3], [0, 1])
    assert len([each for each in events if isinstance(each, Started)]) == 1
    keys = {request.idempotency_key for request in gateway.requests}
    assert len(gateway.requests) == 3
    assert len(keys) == 1
    assert keys != {""}
    left = [request.deadline_ms for request in gateway.requests]
    assert left[0] > left[1] > left[2]


async def test_two_requests_never_share_a_key_of_ours(face: Face, gateway: FakeGateway) -> None:
    gateway.plays = [[finished()], [finished()]]
    for _ in range(2):
        await face.collect("generate", "sd3")
    assert len({request.idempotency_key for request in gateway.requests}) == 2


async def test_attempts_are_bounded(face: Face, gateway: FakeGateway) -> None:
    gateway.plays = [[errors.Unavailable("no node", reason="NoReplica")] for _ in range(9)]
    with pytest.raises(errors.Unavailable) as info:
        await face.call("image", "sd3")
    assert info.value.reason == "NoReplica"
    assert len(gateway.requests) == 5


async def test_a_gateway_that_is_not_there_is_unavailable_by_name(face_type: type[Face]) -> None:
    face = face_type("127.0.0.1:1", attempts=2)
    with pytest.raises(errors.Unavailable, match=r"127\.0\.0\.1:1"):
        await face.call("workflows")
    await face.close()


async def test_a_stream_that_ends_too_early_is_an_error(face: Face, gateway: FakeGateway) -> None:
    gateway.plays = [[stepped(1)]]
    with pytest.raises(errors.Internal, match="before the request was finished"):
        await face.call("images", "sd3")


async def test_leaving_the_iterator_cancels_the_request(face: Face, gateway: FakeGateway) -> None:
    gateway.plays = [[stepped(1), stepped(2), WAIT]]
    taken = await face.take_and_leave(2, "sd3")
    assert [each.step for each in taken if isinstance(each, Stepped)] == [1, 2]
    await gateway.left.wait()


async def test_cancelling_the_task_cancels_the_request(gateway: FakeGateway) -> None:
    gateway.plays = [[WAIT]]
    async with (
        asyncio.timeout(SECONDS),
        serving(gateway) as address,
        AsyncClient(address) as client,
    ):
        task = asyncio.create_task(client.image("sd3"))
        await gateway.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gateway.left.wait()


async def test_jobs_are_submitted_found_and_waited_for(face: Face, gateway: FakeGateway) -> None:
    def progress(job: gateway_pb2.Job) -> None:
        job.step += 1
        if job.step == 3:
            job.state = gateway_pb2.JOB_STATE_SUCCEEDED
            job.ended.FromDatetime(datetime(2026, 1, 2, tzinfo=UTC))
            job.images.add(png=png("red"), width=4, height=3, seed=7)

    gateway.on_get = progress
    job = await face.call("submit", "sd3", prompt="x")
    assert (job.id, job.workflow, job.state) == ("job-1", "sd3", JobState.QUEUED)
    assert job.started is None
    done = await face.call("wait", "job-1", every=0.001)
    assert done.state is JobState.SUCCEEDED
    assert done.ended == datetime(2026, 1, 2, tzinfo=UTC)
    assert done.images[0].pil().size == (4, 3)


async def test_waiting_for_a_job_has_a_limit(face: Face, gateway: FakeGateway) -> None:
    await face.call("submit", "sd3")
    with pytest.raises(errors.DeadlineExceeded, match="job-1"):
        await face.call("wait", "job-1", timeout=0.01, every=0.001)


async def test_a_job_can_be_cancelled_and_an_unknown_one_is_not_found(
    face: Face, gateway: FakeGateway
) -> None:
    await face.call("submit", "sd3")
    assert (await face.call("cancel", "job-1")).state is JobState.CANCELLED
    with pytest.raises(errors.NotFound, match="job-2"):
        await face.call("get", "job-2")


async def test_a_submission_is_tried_again_under_its_key(face: Face, gateway: FakeGateway) -> None:
    gateway.failures = [errors.Unavailable("restarting")]
    await face.call("submit", "sd3")
    first, second = gateway.calls
    assert first == second
    assert isinstance(first, gateway_pb2.SubmitRequest)
    assert first.request.idempotency_key


async def test_jobs_are_listed_over_all_pages(face: Face, gateway: FakeGateway) -> None:
    for number in range(5):
        gateway.jobs[str(number)] = gateway_pb2.Job(id=str(number), state="JOB_STATE_RUNNING")
    states = {JobState.RUNNING, JobState.QUEUED}
    jobs = await face.collect("list", workflow="sd3", states=states, page_size=2)
    assert [job.id for job in jobs] == ["0", "1", "2", "3", "4"]
    request = gateway.calls[0]
    assert isinstance(request, gateway_pb2.ListRequest)
    assert set(request.states) == {1, 2}
    assert (request.workflow, request.tenant, len(gateway.calls)) == ("sd3", "acme", 3)


async def test_workflows_say_what_they_take(face: Face, gateway: FakeGateway) -> None:
    steps = gateway_pb2.InputInfo(
        name="steps", type="integer", default=tensor_pb2.Value(integer=28), minimum=1
    )
    prompt = gateway_pb2.InputInfo(name="prompt", type="string", required=True)
    pruned = gateway_pb2.WorkflowInfo(name="pruned", budgets=[1, 0.6], budget=0.6)
    gateway.workflows = [
        gateway_pb2.WorkflowInfo(name="sd3", ready=True, inputs=[prompt, steps]),
        pruned,
    ]
    workflow, other = await face.call("workflows")
    assert (workflow.budgets, workflow.budget) == ((), None)
    assert (other.budgets, other.budget) == ((1.0, 0.6), 0.6)
    assert (workflow.name, workflow.ready) == ("sd3", True)
    assert [(each.name, each.required) for each in workflow.inputs] == [
        ("prompt", True),
        ("steps", False),
    ]
    assert workflow.inputs[1].default == 28
    assert (workflow.inputs[1].minimum, workflow.inputs[1].maximum) == (1.0, None)


async def test_status_shows_nodes_and_their_models(face: Face, gateway: FakeGateway) -> None:
    model = node_pb2.ModelStatus(identity="m", state="MODEL_STATE_LOADING", stages=["denoise"])
    load = node_pb2.LoadReport(queued=9, running=1, tensors=2, tensor_bytes=5, memory_used=3)
    node = node_pb2.DescribeResponse(node_id="n", models=[model], load=load, memory_limit=8)
    gateway.status = gateway_pb2.GetStatusResponse(nodes=[node], unreachable=["x"], held=4)
    status = await face.call("status")
    (seen,) = status.nodes
    assert (seen.id, seen.queued, seen.running, seen.tensors, seen.memory_limit) == (
        "n",
        9,
        1,
        2,
        8,
    )
    assert (seen.models[0].state, seen.models[0].stages) == ("loading", ("denoise",))
    assert (status.unreachable, status.held) == (("x",), 4)


def test_the_client_imports_no_framework() -> None:
    code = (
        "import sys, kubediffusion.client\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'huggingface_hub', 'fastapi', 'PIL'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
