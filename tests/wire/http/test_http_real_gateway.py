# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The HTTP face over a real gateway and model nodes that speak real gRPC."""

from __future__ import annotations

import asyncio
import base64
import io
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
from http_fakes import PATIENCE
from PIL import Image

from kubediffusion.gateway.http import build_app

sys.path.insert(0, str(Path(__file__).parents[1] / "gateway"))
from gateways import CONFIG, assert_empty, gateway_over, one_node


@asynccontextmanager
async def package_over(gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    """The `openai` package in the gateway's own event loop."""
    app = build_app(gateway)
    transport = httpx.ASGITransport(app)
    async with (
        httpx.AsyncClient(transport=transport) as http,
        openai.AsyncOpenAI(
            base_url="http://gateway/v1", api_key="any", max_retries=0, http_client=http
        ) as client,
    ):
        yield client
    assert app.state.budget.used == 0


def _size(b64: str) -> tuple[int, int]:
    with Image.open(io.BytesIO(base64.b64decode(b64))) as image:
        return image.size


async def test_images_come_from_the_nodes(tmp_path, monkeypatch):
    # A picture that is done overtakes its preview: the last step waits until that was told.
    told = asyncio.Event()
    told.set()
    node = one_node(tmp_path, script=lambda node, assign, step: told.wait() if step == 3 else None)
    async with gateway_over([node]) as gateway, package_over(gateway) as client:
        ours = {"seed": 7, "steps": 4}
        one = await client.images.generate(model="sd3", prompt="a fox", extra_body=ours)
        two = await client.images.generate(prompt="a fox", n=2, extra_body=ours | {"seed": 6})
        assert one.data[0].b64_json == two.data[1].b64_json != two.data[0].b64_json
        assert _size(one.data[0].b64_json) == (8, 8)
        told.clear()
        monkeypatch.setattr(gateway.measures, "previewed", lambda *about, **more: told.set())
        stream = await client.images.generate(
            prompt="a fox", stream=True, partial_images=1, extra_body=ours
        )
        events = [event async for event in stream]
        assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "completed"]
        assert events[-1].b64_json == one.data[0].b64_json
        models = await client.models.list()
        assert [(model.id, model.ready) for model in models.data] == [("sd3", True)]
        assert_empty(gateway)


async def test_an_edit_sends_its_image_to_the_nodes(tmp_path):
    upload = io.BytesIO()
    Image.new("RGB", (16, 16), (1, 2, 3)).save(upload, "PNG")
    node = one_node(tmp_path)
    async with gateway_over([node]) as gateway, package_over(gateway) as client:
        answer = await client.images.edit(
            image=upload.getvalue(), prompt="a fox", extra_body={"seed": 7, "strength": 0.5}
        )
        assert len(answer.data) == 1
        sent = next(assign for assign in node.assigned if assign.stage == "encode_image")
        assert sent.inputs["image"].blob == upload.getvalue()
        with pytest.raises(openai.BadRequestError) as caught:
            await client.images.edit(image=b"no image", prompt="a fox")
        assert caught.value.param == "image"
        assert_empty(gateway)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "7x8"}, "size"),
        ({"extra_body": {"num_inference_steps": 100_000}}, "num_inference_steps"),
        ({"extra_body": {"loras": {"undeclared": 1}}}, "loras.undeclared"),
        ({"extra_body": {"inputs": {"colour": "red"}}}, "inputs.colour"),
        ({"extra_body": {"control": {"edges": {"image": "AAAA"}}}}, "control.edges.image"),
    ],
)
async def test_what_the_workflow_does_not_take_is_named_as_it_was_sent(tmp_path, fields, param):
    async with gateway_over([one_node(tmp_path)]) as gateway, package_over(gateway) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.images.generate(prompt="a fox", **fields)
        assert caught.value.param == param
        assert_empty(gateway)


async def test_leaving_frees_everything(tmp_path):
    reached = asyncio.Event()

    def wait_forever(node, assign, step):
        if assign.stage == "denoise" and step == 2:
            reached.set()
            return asyncio.Event().wait()
        return None

    node = one_node(tmp_path, script=wait_forever)
    async with gateway_over([node]) as gateway, package_over(gateway) as client:
        call = asyncio.create_task(client.images.generate(prompt="a fox"))
        await asyncio.wait_for(reached.wait(), PATIENCE)
        call.cancel()
        await asyncio.wait({call})
        await node.until(lambda: bool(node.cancelled), PATIENCE)
        assert_empty(gateway)


async def test_an_idempotency_key_gives_a_retry_the_same_image_and_another_request_a_conflict(
    tmp_path,
):
    node = one_node(tmp_path)
    async with gateway_over([node]) as gateway, package_over(gateway) as client:
        key = {"Idempotency-Key": "once"}
        first = await client.images.generate(prompt="a fox", extra_headers=key)
        ran = len(node.assigned)
        again = await client.images.generate(prompt="a fox", extra_headers=key)
        assert first.data[0].b64_json == again.data[0].b64_json
        assert len(node.assigned) == ran
        with pytest.raises(openai.ConflictError):
            await client.images.generate(prompt="a hen", extra_headers=key)


async def test_what_a_policy_sheds_is_told_when_to_come_again(tmp_path):
    node = one_node(tmp_path)
    node.run_seconds = {"denoise": 10.0}
    config = replace(CONFIG, policy="kubediffusion")
    async with gateway_over([node], config=config) as gateway, package_over(gateway) as client:
        await client.images.generate(model="sd3", prompt="a fox")  # measures
        with pytest.raises(openai.RateLimitError) as caught:
            await client.images.generate(
                model="sd3", prompt="a fox", extra_body={"deadline_ms": 5000}
            )
        assert caught.value.code == "deadline_infeasible"
        assert 5 <= int(caught.value.response.headers["Retry-After"]) <= 10
        assert_empty(gateway)
