# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Whole requests through the gateway: what clients get, and what is left behind (nothing)."""

from __future__ import annotations

import asyncio
import io
import random
from dataclasses import replace

import pytest
from fake_nodes import failed
from gateways import (
    CONFIG,
    assert_empty,
    changed,
    events_of,
    gateway_over,
    identities,
    images,
    kinds,
    one_node,
    request,
    workflow,
)
from PIL import Image

from kubediffusion.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidInput,
    KubeDiffusionError,
    NotFound,
    Overloaded,
    Unavailable,
)
from kubediffusion.gateway.config import KeptResults
from kubediffusion.scheduling.admission import AdmissionLimits
from kubediffusion.v1alpha1 import node_pb2, tensor_pb2
from kubediffusion.workflow import Slo


def png(width: int = 8, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


async def test_a_request_tells_its_story_and_ends_with_where_the_time_went(tmp_path):
    async with gateway_over([one_node(tmp_path)]) as gateway:
        events = await events_of(gateway, request(previews=1))
        told = kinds(events)
        assert told[0] == "queued"
        assert told[-2:] == ["image", "finished"]
        assert told.count("stepped") == 8
        assert told.count("preview") == 1
        assert len({event.request_id for event in events}) == 1
        image = images(events)[0]
        assert image.seed == 7
        with Image.open(io.BytesIO(image.png)) as picture:
            assert picture.size == (image.width, image.height) == (8, 8)
        stages = events[-1].finished.stages
        assert [stage.task for stage in stages][-2:] == ["denoise", "decode"]
        assert all(stage.attempts == 1 and stage.node == "a" for stage in stages)
        assert_empty(gateway)


async def test_n_images_are_n_requests_with_seeds_that_follow(tmp_path):
    async with gateway_over([one_node(tmp_path)]) as gateway:
        three = images(await events_of(gateway, request(n=3)))
        assert [image.seed for image in three] == [7, 8, 9]
        alone = [images(await events_of(gateway, request(seed=s)))[0] for s in (7, 8, 9)]
        assert [image.png for image in three] == [image.png for image in alone]
        assert len({image.png for image in three}) == 3
        assert_empty(gateway)


async def test_without_a_seed_or_a_key_each_request_draws_its_own(tmp_path):
    async with gateway_over([one_node(tmp_path)]) as gateway:
        seeds = {images(await events_of(gateway, request(seed=None)))[0].seed for _ in range(3)}
        assert len(seeds) == 3


async def test_a_retry_with_a_key_gets_the_same_images_without_running_again(tmp_path):
    node = one_node(tmp_path)
    async with gateway_over([node]) as gateway:
        keyed = request(seed=None, idempotency_key="k1")
        first = await events_of(gateway, keyed)
        ran = len(node.assigned)
        keyed.deadline_ms = 5000  # what a retry may change
        again = await events_of(gateway, keyed)
        assert images(again) == images(first)
        assert again[-1].request_id == first[-1].request_id
        assert len(node.assigned) == ran
        assert kinds(again)[-1] == "finished"


async def test_a_retry_joins_a_request_under_way(tmp_path):
    go = asyncio.Event()
    node = one_node(tmp_path, script=lambda node, assign, step: go.wait() if step == 2 else None)
    async with gateway_over([node]) as gateway:
        keyed = request(idempotency_key="k1")
        first = asyncio.create_task(events_of(gateway, keyed))
        await node.until(lambda: any(a.stage == "denoise" for a in node.assigned))
        second = asyncio.create_task(events_of(gateway, keyed))
        await asyncio.sleep(0)
        go.set()
        a, b = await asyncio.gather(first, second)
        assert images(a) == images(b)
        assert sum(a.stage == "denoise" for a in node.assigned) == 1
        assert_empty(gateway)


async def test_one_of_two_listeners_may_leave(tmp_path):
    go = asyncio.Event()
    node = one_node(tmp_path, script=lambda node, assign, step: go.wait() if step == 2 else None)
    async with gateway_over([node]) as gateway:
        keyed = request(idempotency_key="k1")
        first = asyncio.create_task(events_of(gateway, keyed))
        await node.until(lambda: any(a.stage == "denoise" for a in node.assigned))
        second = asyncio.create_task(events_of(gateway, keyed))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        go.set()
        assert kinds(await second)[-1] == "finished"


async def test_a_key_used_for_another_request_is_a_conflict(tmp_path):
    async with gateway_over([one_node(tmp_path)]) as gateway:
        await events_of(gateway, request(idempotency_key="k1"))
        with pytest.raises(Conflict) as caught:
            await events_of(gateway, request(idempotency_key="k1", prompt="a cat"))
        assert caught.value.field == "idempotency_key"
        # Another tenant's keys are its own.
        other = await events_of(
            gateway, request(idempotency_key="k1", prompt="a cat", tenant="other")
        )
        assert images(other)


async def test_what_is_kept_for_retries_is_bounded(tmp_path):
    config = replace(CONFIG, results=KeptResults(count=2))
    async with gateway_over([one_node(tmp_path)], config=config) as gateway:
        for number in range(5):
            await events_of(gateway, request(idempotency_key=f"k{number}"))
        assert len(gateway._results) <= 2


async def test_a_failed_request_may_be_tried_again_under_its_key(tmp_path):
    broken = [True]

    def script(node, assign, step):
        if broken and assign.stage == "decode":
            return failed(assign, node_pb2.FAILURE_REASON_INVALID_INPUT, "no")
        return None

    async with gateway_over([one_node(tmp_path, script=script)]) as gateway:
        with pytest.raises(InvalidInput):
            await events_of(gateway, request(idempotency_key="k1"))
        broken.clear()
        assert images(await events_of(gateway, request(idempotency_key="k1")))


async def test_closing_the_iterator_cancels_everywhere(tmp_path):
    never = asyncio.Event()
    node = one_node(tmp_path, script=lambda node, assign, step: never.wait() if step == 3 else None)
    async with gateway_over([node]) as gateway:
        events = gateway.generate(request())
        async for event in events:
            if event.WhichOneof("kind") == "stepped":
                request_id = event.request_id
                break
        await events.aclose()
        assert_empty(gateway)
        await node.until(lambda: request_id in node.released)
        assert request_id in node.cancelled


async def test_a_deadline_that_passes_ends_the_request(tmp_path):
    never = asyncio.Event()
    node = one_node(tmp_path, script=lambda node, assign, step: never.wait() if step == 3 else None)
    async with gateway_over([node]) as gateway:
        with pytest.raises(DeadlineExceeded) as caught:
            await events_of(gateway, request(deadline_ms=300))
        assert caught.value.field == "deadline_ms"
        assert_empty(gateway)


async def test_a_deadline_that_cannot_be_kept_is_refused_at_once(tmp_path):
    async with gateway_over([one_node(tmp_path)]) as gateway:
        await events_of(gateway, request())  # measures
        for ref in workflow().models.values():
            for stage in ("encode", "denoise", "decode"):
                for _ in range(20):
                    gateway.profiles.observe_run(ref.identity, stage, "cpu-1", 1.0, 50.0)
        with pytest.raises(Overloaded) as caught:
            await events_of(gateway, request(deadline_ms=1000, width=4, height=8))
        assert caught.value.reason == "DeadlineInfeasible"
        assert caught.value.retry_after > 0
        assert_empty(gateway)


async def test_a_full_queue_refuses_and_takes_again_when_there_is_room(tmp_path):
    go = asyncio.Event()
    node = one_node(tmp_path, script=lambda node, assign, step: go.wait() if step == 0 else None)
    config = replace(CONFIG, admission=AdmissionLimits(max_queue=3))
    async with gateway_over([node], config=config) as gateway:
        running = asyncio.create_task(events_of(gateway, request(n=2)))
        await node.until(lambda: any(a.stage == "denoise" for a in node.assigned))
        with pytest.raises(Overloaded) as caught:
            await events_of(gateway, request(n=2))
        assert caught.value.reason == "QueueFull"
        go.set()
        await running
        assert len(images(await events_of(gateway, request(n=3)))) == 3


async def test_a_request_is_held_until_its_models_come_up(tmp_path):
    node = one_node(tmp_path)
    gateway_nodes = [one_node(tmp_path, "b")]
    gateway_nodes[0].models = identities(workflow(), "text_encoder")
    async with gateway_over(gateway_nodes) as gateway:
        events = gateway.generate(request())
        first = await anext(events)
        assert first.queued.cold
        await node.start()
        gateway.set_nodes([node.address, gateway_nodes[0].address])
        rest = [event async for event in events]
        assert kinds(rest)[-1] == "finished"
        await node.stop()


async def test_models_that_never_come_up_fail_the_request_and_are_named(tmp_path):
    served = {"sd3": workflow(Slo(activation_timeout_seconds=0.1))}
    node = one_node(tmp_path)
    node.models = identities(workflow(), "text_encoder")
    async with gateway_over([node], served) as gateway:
        await changed(gateway, lambda: not gateway.fleet.missing(node.models))
        with pytest.raises(Unavailable) as caught:
            await events_of(gateway, request())
        assert caught.value.reason == "NoReplica"
        assert "text_encoder_2" in str(caught.value)
        assert_empty(gateway)


@pytest.mark.parametrize("change", [{"nonsense": 1}, {"steps": 0}, {"prompt": 3}])
async def test_wrong_requests_are_refused_before_their_models_are_up(change):
    async with gateway_over([]) as gateway:
        with pytest.raises(InvalidInput):
            await events_of(gateway, request(**change))
        assert_empty(gateway)


@pytest.mark.parametrize(
    ("change", "field", "error"),
    [
        ({"workflow": "nope"}, "workflow", NotFound),
        ({"prompt": None}, "inputs.prompt", InvalidInput),
        ({"prompt": 3}, "inputs.prompt", InvalidInput),
        ({"nonsense": 1}, "inputs.nonsense", InvalidInput),
        ({"steps": 0}, "inputs.steps", InvalidInput),
        ({"steps": 10**6}, "inputs.steps", InvalidInput),
        ({"steps": "many"}, "inputs.steps", InvalidInput),
        ({"width": 9}, "inputs.width", InvalidInput),
        ({"seed": -1}, "inputs.seed", InvalidInput),
        ({"prompt": "x" * 20_000}, "inputs.prompt", InvalidInput),
        ({"guidance": float("nan")}, "inputs.guidance", InvalidInput),
        ({"loras": {"style": 1.0}}, "loras.style", InvalidInput),
        ({"n": 1000}, "n", InvalidInput),
        ({"deadline_ms": 0}, "deadline_ms", InvalidInput),
        ({"image": b"not an image"}, "inputs.image", InvalidInput),
        ({"image": png()[:40]}, "inputs.image", InvalidInput),
        ({"weight": -1.0}, "weight", InvalidInput),
        ({"budget": 2.0}, "budget", InvalidInput),
        ({"idempotency_key": "k" * 300}, "idempotency_key", InvalidInput),
        ({"prompt": ["a", "b"]}, "inputs.prompt", InvalidInput),
        ({"prompt": tensor_pb2.TensorRef(id="x")}, "inputs.prompt", InvalidInput),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
async def test_a_bad_request_is_refused_and_nothing_else_happens(tmp_path, change, field, error):
    node = one_node(tmp_path)
    async with gateway_over([node]) as gateway:
        await node.until(lambda: bool(node.streams))
        with pytest.raises(error) as caught:
            await events_of(gateway, request(**change))
        assert caught.value.field == field
        assert node.assigned == []
        assert_empty(gateway)


async def test_a_thousand_mixed_requests_leave_nothing_behind(tmp_path):
    """Good, bad, left and hurried ones, many at a time."""
    bad = [
        {"workflow": "nope"},
        {"steps": -1},
        {"nonsense": "x"},
        {"image": b"\x89PNG\r\n"},
        {"n": 99},
        {"prompt": tensor_pb2.TensorRef(id="x")},
        {"loras": {"x": 1.0}},
        {"prompt": None},
        {"width": 7},
    ]
    draw = random.Random(3)
    nodes = [one_node(tmp_path, name, by_reference=name == "b") for name in "ab"]

    async def one(gateway, number: int) -> str:
        choice = draw.random()
        if choice < 0.8:
            try:
                await events_of(gateway, request(**draw.choice(bad)))
            except KubeDiffusionError:
                return "refused"
            raise AssertionError("a bad request went through")
        if choice < 0.9:
            events = gateway.generate(request(seed=number, steps=3))
            async for event in events:
                if event.WhichOneof("kind") == draw.choice(["queued", "stepped", "started"]):
                    break
            await events.aclose()
            return "left"
        await events_of(gateway, request(seed=number, steps=3))
        return "done"

    async with gateway_over(nodes) as gateway:
        outcomes: list[str] = []
        for start in range(0, 1000, 50):
            outcomes += await asyncio.gather(*(one(gateway, start + i) for i in range(50)))
        assert {"refused", "left", "done"} == set(outcomes)
        assert_empty(gateway)
        assigned = {a.key.request_id for node in nodes for a in node.assigned}
        for node in nodes:
            mine = {a.key.request_id for a in node.assigned}
            await node.until(lambda node=node, mine=mine: mine <= node.released)
            assert not node._tasks
        assert assigned
        assert gateway.debug_counts()["releases"] == 0


async def test_the_image_is_pulled_from_its_node_and_made_again_if_it_is_gone(tmp_path):
    nodes = [one_node(tmp_path, "a", by_reference=True)]
    forgotten: list[str] = []

    def forget_first(node, assign, step):
        if assign.stage == "decode" and step == -1 and not forgotten:
            forgotten.append("next")
        elif assign.stage == "decode" and step == -2 and forgotten == ["next"]:
            node.tensors = {k: v for k, v in node.tensors.items() if "/image/" not in k}
            forgotten.append("done")
        return

    nodes[0].script = forget_first
    async with gateway_over(nodes) as gateway:
        events = await events_of(gateway, request())
        assert [event.resumed.reason for event in events if event.HasField("resumed")] == [
            "OutputLost"
        ]
        plain = images(await events_of(gateway, request()))
        assert images(events) == plain


async def test_status_and_workflows_tell_what_is_there(tmp_path):
    node = one_node(tmp_path)
    node.models = identities(workflow(), "text_encoder", "vae")
    async with gateway_over([node]) as gateway:
        await node.until(lambda: bool(node.streams))
        await changed(gateway, lambda: bool(gateway.status().nodes))
        info = gateway.list_workflows()[0]
        assert info.name == "sd3"
        assert not info.ready
        assert "transformer" in info.message
        assert {"prompt", "steps", "seed"} <= {spec.name for spec in info.inputs}
        status = gateway.status()
        assert [n.node_id for n in status.nodes] == ["a"]
        gateway.set_nodes([node.address, f"unix:{tmp_path}/nobody.sock"])
        assert list(gateway.status().unreachable) == [f"unix:{tmp_path}/nobody.sock"]


async def test_stopping_ends_requests_under_way(tmp_path):
    never = asyncio.Event()
    node = one_node(tmp_path, script=lambda node, assign, step: never.wait() if step == 0 else None)
    async with gateway_over([node]) as gateway:
        running = asyncio.create_task(events_of(gateway, request()))
        await node.until(lambda: any(a.stage == "denoise" for a in node.assigned))
        await gateway.stop()
        with pytest.raises(Unavailable):
            await running
        assert_empty(gateway)
