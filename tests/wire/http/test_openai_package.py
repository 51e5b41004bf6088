# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The official `openai` package, unchanged, as a client over a real socket."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncGenerator

import httpx
import openai
import pytest
from http_fakes import PATIENCE, FakeGateway, draw, event, image_event, png, serving, workflow
from PIL import Image

from kubediffusion import errors
from kubediffusion.gateway.http import build_app
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2


def _decode(b64: str | None) -> Image.Image:
    assert b64 is not None
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    image.load()
    return image


def test_an_image_comes_as_the_gateways_own_png_in_base64_by_default(client, drawn):
    answer = client.images.generate(prompt="a red circle", model="shapes")
    assert [base64.b64decode(image.b64_json) for image in answer.data] == [png(0)]
    assert (answer.size, answer.output_format, answer.background) == ("64x48", "png", "opaque")
    assert drawn.last.workflow == "shapes"
    assert drawn.last.inputs["prompt"].text == "a red circle"
    assert drawn.last.n == 1


def test_what_was_not_sent_is_left_to_the_workflow(client, drawn):
    client.images.generate(prompt="x", size="auto")
    assert set(drawn.last.inputs) == {"prompt"}
    assert not drawn.last.HasField("deadline_ms")
    assert drawn.last.numerics == node_pb2.NUMERICS_UNSPECIFIED


def test_n_images_come_in_order_with_their_seeds(client):
    answer = client.images.generate(prompt="x", n=3, extra_body={"seed": 7})
    assert [image.seed for image in answer.data] == [7, 8, 9]
    assert [base64.b64decode(image.b64_json) for image in answer.data] == [png(7), png(8), png(9)]


def test_size_sets_width_and_height(client, drawn):
    answer = client.images.generate(prompt="x", size="96x32")
    assert answer.size == "96x32"
    assert drawn.last.inputs["width"].integer == 96
    assert drawn.last.inputs["height"].integer == 32


def test_extra_fields_reach_the_workflow(client, drawn):
    client.images.generate(
        prompt="x",
        user="ada",
        extra_body={
            "seed": 5,
            "steps": 9,
            "guidance_scale": 3.5,
            "negative_prompt": "blue",
            "max_sequence_length": 77,
            "loras": {"pastel": 0.5},
            "control": {"edges": {"image": base64.b64encode(png(1)).decode(), "scale": 0.7}},
            "deadline_ms": 9000,
            "priority": 2,
            "numerics": "fast",
            "budget": 0.5,
            "inputs": {"tiles": 4, "softness": 1, "mirrored": True},
        },
        extra_headers={
            "Idempotency-Key": "once",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        },
    )
    request = drawn.last
    assert request.inputs["seed"].integer == 5
    assert request.inputs["steps"].integer == 9
    assert request.inputs["guidance"].number == 3.5
    assert request.inputs["negative_prompt"].text == "blue"
    assert request.inputs["max_sequence_length"].integer == 77
    assert request.inputs["control.edges"].blob == png(1)
    assert request.inputs["control.edges.scale"].number == 0.7
    assert request.inputs["tiles"].integer == 4
    assert request.inputs["mirrored"].flag is True
    assert dict(request.loras) == {"pastel": 0.5}
    assert (request.deadline_ms, request.priority, request.budget) == (9000, 2, 0.5)
    assert request.numerics == node_pb2.NUMERICS_FAST
    assert (request.tenant, request.idempotency_key) == ("ada", "once")
    assert request.traceparent.startswith("00-0af76519")


def test_an_image_by_url_can_be_fetched(client):
    answer = client.images.generate(prompt="x", n=2, response_format="url", extra_body={"seed": 3})
    for image, seed in zip(answer.data, (3, 4), strict=True):
        assert image.b64_json is None
        got = httpx.get(image.url)
        assert got.content == png(seed)
        assert got.headers["content-type"] == "image/png"
        assert got.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(("form", "name"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_other_formats_are_made_as_asked(client, drawn, form, name):
    async def noise(request):
        buffer = io.BytesIO()
        Image.effect_noise((128, 96), 50).convert("RGB").save(buffer, "PNG")
        yield event(image=gateway_pb2.Image(png=buffer.getvalue(), width=128, height=96))

    drawn.script = noise
    kwargs = {"prompt": "x", "output_format": form}
    fine = client.images.generate(**kwargs)
    small = client.images.generate(**kwargs, output_compression=5, response_format="url")
    image = _decode(fine.data[0].b64_json)
    assert (image.format, image.size, fine.output_format) == (name, (128, 96), form)
    got = httpx.get(small.data[0].url)
    assert got.headers["content-type"] == f"image/{form}"
    assert len(got.content) < len(base64.b64decode(fine.data[0].b64_json)) / 2
    streamed = list(client.images.generate(**kwargs, stream=True))
    assert _decode(streamed[-1].b64_json).format == name


def test_a_stream_brings_partial_images_and_then_the_image(client, drawn):
    with client.images.generate(
        prompt="x", stream=True, partial_images=2, extra_body={"seed": 11}
    ) as stream:
        events = list(stream)
    kinds = [each.type.removeprefix("image_generation.") for each in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    assert [each.partial_image_index for each in events[:2]] == [0, 1]
    assert base64.b64decode(events[2].b64_json) == png(11)
    assert (events[2].size, events[2].output_format) == ("64x48", "png")
    assert events[2].usage.total_tokens == 0
    assert events[2].seed == 11
    assert drawn.last.previews == 2


def test_a_stream_of_several_images_says_which_is_which(client):
    stream = client.images.generate(prompt="x", n=2, stream=True, partial_images=1)
    told = [(each.type.rpartition(".")[2], each.image_index) for each in stream]
    assert told == [("partial_image", 0), ("completed", 0), ("partial_image", 1), ("completed", 1)]


def test_an_edit_starts_from_the_uploaded_image(client, drawn):
    answer = client.images.edit(
        image=("in.png", png(9)),
        prompt="make it blue",
        n=2,
        size="80x80",
        extra_body={
            "strength": 0.4,
            "seed": 2,
            "loras": {"pastel": 1.5},
            "inputs": {"tiles": 3, "softness": 0.5, "mirrored": True},
            "control": {"edges": {"image": base64.b64encode(png(4)).decode(), "end": 0.5}},
        },
    )
    assert [base64.b64decode(i.b64_json) for i in answer.data] == [png(2, 80, 80), png(3, 80, 80)]
    request = drawn.last
    assert request.inputs["image"].blob == png(9)
    assert request.inputs["strength"].number == 0.4
    assert request.inputs["tiles"].integer == 3
    assert request.inputs["softness"].number == 0.5
    assert request.inputs["mirrored"].flag is True
    assert request.inputs["control.edges"].blob == png(4)
    assert request.inputs["control.edges.end"].number == 0.5
    assert dict(request.loras) == {"pastel": 1.5}


def test_an_edit_streams_with_events_of_its_own(client):
    stream = client.images.edit(image=[png(9)], prompt="x", stream=True, partial_images=1)
    assert [each.type for each in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_a_large_upload_arrives_whole_and_touches_no_disk(client, drawn, monkeypatch, tmp_path):
    # A temporary file would have to be made in a folder that is not there.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    large = bytes(range(256)) * 20_000
    client.images.edit(image=large, prompt="x")
    assert drawn.last.inputs["image"].blob == large


def test_models_are_the_workflows(client, drawn):
    drawn.workflows = [workflow("shapes"), workflow("late", ready=False)]
    assert [(m.id, m.object, m.owned_by) for m in client.models.list()] == [
        ("shapes", "model", "kubediffusion"),
        ("late", "model", "kubediffusion"),
    ]
    late = client.models.retrieve("late")
    assert late.ready is False
    steps = next(each for each in late.inputs if each["name"] == "steps")
    assert (steps["type"], steps["default"], steps["maximum"]) == ("integer", 28, 100)
    assert late.loras == ["pastel"]


def test_without_a_model_the_only_workflow_is_meant(client, drawn):
    client.images.generate(prompt="x")
    assert drawn.last.workflow == "shapes"
    drawn.workflows.append(workflow("other"))
    with pytest.raises(openai.BadRequestError, match="'other', 'shapes'") as caught:
        client.images.generate(prompt="x")
    assert caught.value.param == "model"


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="x", model="dall-e-2")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-2")
    with pytest.raises(openai.NotFoundError), pytest.warns(DeprecationWarning, match="deprecated"):
        client.images.create_variation(image=png(1))


@pytest.mark.parametrize(
    ("error", "expected", "code"),
    [
        (errors.InvalidInput("too many"), openai.BadRequestError, "invalid_input"),
        (errors.NotFound("gone"), openai.NotFoundError, "not_found"),
        (errors.Conflict("other request"), openai.ConflictError, "conflict"),
        (errors.Overloaded("full", retry_after=2.5), openai.RateLimitError, "overloaded"),
        (errors.DeadlineExceeded("late"), openai.APIStatusError, "deadline_exceeded"),
        (errors.Unavailable("no node"), openai.InternalServerError, "unavailable"),
        (errors.TensorLost("lost"), openai.InternalServerError, "tensor_lost"),
        (errors.Internal("our bug"), openai.InternalServerError, "internal"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_each_failure_raises_the_packages_own_exception(
    client, drawn, error, expected, code, stream
):
    async def fail(request):
        raise error
        yield

    drawn.script = fail
    with pytest.raises(expected) as caught:
        client.images.generate(prompt="x", stream=stream)
    assert caught.value.code == code
    assert caught.value.status_code == error.http_status
    assert error.message in caught.value.message


def test_a_full_gateway_says_when_to_come_back(client, drawn):
    async def refuse(request):
        raise errors.Overloaded("full", retry_after=2.25)
        yield

    drawn.script = refuse
    with pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(prompt="x")
    headers = caught.value.response.headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("3", "2250")


def test_the_package_retries_a_full_gateway_and_succeeds(client, drawn):
    async def refuse_once(request):
        if len(drawn.requests) == 1:
            raise errors.Overloaded("full", retry_after=0.01)
        async for each in draw(request):
            yield each

    drawn.script = refuse_once
    client.with_options(max_retries=1).images.generate(prompt="x")
    assert len(drawn.requests) == 2


@pytest.mark.parametrize(
    "error", [errors.Conflict("used"), errors.DeadlineExceeded("late")], ids=lambda e: e.reason
)
def test_the_package_does_not_retry_what_no_retry_can_mend(client, drawn, error):
    async def refuse(request):
        raise error
        yield

    drawn.script = refuse
    with pytest.raises(openai.APIStatusError):
        client.with_options(max_retries=2).images.generate(prompt="x")
    assert len(drawn.requests) == 1


def test_an_error_in_the_middle_of_a_stream_is_raised_to_the_reader(client, drawn):
    async def break_down(request):
        yield event(queued=gateway_pb2.Queued())
        raise errors.Unavailable("the last node is gone")

    drawn.script = break_down
    stream = client.images.generate(prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="the last node is gone"):
        list(stream)


def test_a_wrong_key_is_an_authentication_error(gateway: FakeGateway):
    with serving(build_app(gateway, api_keys=frozenset({"s3cret", "other"}))) as url:
        for key in ("wrong", "s3cre", "s3cret2"):
            bad = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
            with bad, pytest.raises(openai.AuthenticationError) as caught:
                bad.images.generate(prompt="x")
            assert caught.value.code == "invalid_api_key"
        assert gateway.requests == []
        with openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret", max_retries=0) as good:
            good.images.generate(prompt="x", user="somebody else")
        # A caller with a key cannot take another's name, and the key is not given away.
        assert gateway.last.tenant.startswith("key-")
        assert "s3cret" not in gateway.last.tenant


class Waiting:
    """A request that goes on until it is cancelled."""

    def __init__(self, gateway: FakeGateway) -> None:
        self.gateway = gateway
        gateway.script = self.script

    async def script(
        self, request: gateway_pb2.GenerateRequest
    ) -> AsyncGenerator[gateway_pb2.GenerateEvent, None]:
        yield event(queued=gateway_pb2.Queued())
        if request.previews:
            preview = gateway_pb2.Image(png=png(1), width=64, height=48)
            yield event(preview=preview)
        self.gateway.started.set()
        await asyncio.Event().wait()

    async def until_started(self) -> None:
        assert await asyncio.to_thread(self.gateway.started.wait, PATIENCE)

    async def until_closed(self) -> None:
        assert await asyncio.to_thread(self.gateway.closed.wait, PATIENCE)


async def test_the_async_client_draws_many_at_once(served):
    url, _ = served
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        answers = await asyncio.gather(
            *(client.images.generate(prompt="x", extra_body={"seed": s}) for s in range(8))
        )
        stream = await client.images.generate(prompt="x", stream=True)
        assert [each.type async for each in stream] == ["image_generation.completed"]
    assert [base64.b64decode(a.data[0].b64_json) for a in answers] == [png(s) for s in range(8)]


@pytest.mark.parametrize("endpoint", ["generate", "edit"])
async def test_a_client_that_leaves_cancels_its_request(served, endpoint):
    url, gateway = served
    waiting = Waiting(gateway)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        image = {"image": png(1)} if endpoint == "edit" else {}
        call = asyncio.create_task(getattr(client.images, endpoint)(prompt="x", **image))
        await waiting.until_started()
        call.cancel()
        await asyncio.wait({call})
        await waiting.until_closed()
    assert gateway.open == 0


@pytest.mark.parametrize("previews", [0, 1])
async def test_a_client_that_leaves_a_stream_cancels_its_request(served, previews):
    url, gateway = served
    waiting = Waiting(gateway)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        stream = await client.images.generate(prompt="x", stream=True, partial_images=previews)
        await waiting.until_started()
        await stream.close()
        await waiting.until_closed()
    assert gateway.open == 0


def test_the_gateway_is_closed_after_each_kind_of_answer(client, drawn):
    client.images.generate(prompt="x")
    list(client.images.generate(prompt="x", stream=True))

    async def one_of_two(request):
        yield image_event(request, 0)

    drawn.script = one_of_two
    with pytest.raises(openai.InternalServerError, match="1 of 2 images"):
        client.images.generate(prompt="x", n=2)
    assert drawn.open == 0
