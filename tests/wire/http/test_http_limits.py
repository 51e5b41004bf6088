# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Clients that send too much, too slowly or do not read, and images that are kept for a time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from http_calls import EDITS, GENERATIONS, check_error, client_of
from http_fakes import FakeGateway, draw, event

from kubediffusion import errors
from kubediffusion.gateway.http import HttpLimits, build_app
from kubediffusion.gateway.openai.files import ImageStore
from kubediffusion.gateway.openai.routes import StreamLimits
from kubediffusion.v1alpha1 import gateway_pb2


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
async def test_a_body_is_counted_as_it_comes(gateway, path, declared):
    app = build_app(gateway, limits=HttpLimits(body_bytes=10_000))
    sent = 0

    async def chunks():
        nonlocal sent
        head = b'{"prompt": "' if path == GENERATIONS else b"--x\r\n\r\n"
        for _ in range(20):
            sent += 1
            yield head + b"x" * 1000

    kind = "application/json" if path == GENERATIONS else "multipart/form-data; boundary=x"
    headers = {"Content-Type": kind} | ({"Content-Length": "20240"} if declared else {})
    async with client_of(app) as http:
        if path == EDITS:
            big = {"files": {"image": b"x" * 20_000}, "data": {"prompt": "x"}}
            answer = await http.post(path, **big)
        else:
            answer = await http.post(path, content=chunks(), headers=headers)
            # All was taken in, so that the client could come to read the answer.
            assert sent == 20
    assert check_error(answer, 413)["code"] == "request_too_large"
    assert answer.headers["connection"] == "close"
    assert app.state.budget.used == 0


async def test_where_gateways_take_turns_an_image_by_url_is_refused_before_it_is_drawn(gateway):
    app = build_app(gateway, image_urls=False)
    async with client_of(app) as http:
        body = {"model": "shapes", "prompt": "x", "response_format": "url"}
        error = check_error(await http.post(GENERATIONS, json=body), 400)
        assert error["param"] == "response_format"
        assert "b64_json" in error["message"]
        assert "gateway.service.sessionAffinity" in error["message"]
        assert not gateway.requests
        answer = await http.post(GENERATIONS, json=body | {"response_format": "b64_json"})
        assert answer.status_code == 200


async def test_a_body_that_does_not_arrive_is_given_up(gateway):
    app = build_app(gateway, limits=HttpLimits(body_seconds=0.01))

    async def never():
        yield b"{"
        await asyncio.Event().wait()

    async with client_of(app) as http:
        answer = await http.post(
            GENERATIONS, content=never(), headers={"Content-Type": "application/json"}
        )
    check_error(answer, 408)
    assert app.state.budget.used == 0


async def test_the_bodies_of_all_requests_together_are_bounded(gateway):
    app = build_app(gateway, limits=HttpLimits(body_bytes=6000, bodies_bytes=10_000))
    inside, leave = asyncio.Event(), asyncio.Event()

    async def wait(request):
        inside.set()
        await leave.wait()
        async for each in draw(request):
            yield each

    gateway.script = wait
    body = {"prompt": "x" * 5900}
    async with client_of(app) as http:
        first = asyncio.create_task(http.post(GENERATIONS, json=body))
        await inside.wait()
        refused = await http.post(GENERATIONS, json=body)
        check_error(refused, 429)
        assert refused.headers["retry-after"] == "1"
        leave.set()
        assert (await first).status_code == 200
        assert app.state.budget.used == 0
        assert (await http.post(GENERATIONS, json=body)).status_code == 200


async def test_an_image_by_url_is_gone_when_its_time_is_over(gateway):
    clock = [0.0]
    app = build_app(gateway, limits=HttpLimits(store_seconds=60), now=lambda: clock[0])
    async with client_of(app) as http:
        answer = await http.post(GENERATIONS, json={"prompt": "x", "response_format": "url"})
        url = answer.json()["data"][0]["url"]
        clock[0] = 59.0
        got = await http.get(url)
        assert got.headers["cache-control"] == "private, immutable, max-age=1"
        clock[0] = 60.0
        check_error(await http.get(url), 404)
    assert app.state.store.nbytes == 0


def test_the_store_drops_the_oldest_and_never_holds_more_than_it_may():
    store = ImageStore(capacity=100, ttl=60, now=lambda: 0.0)
    old, new = store.add([b"a" * 40], "png") + store.add([b"b" * 40], "png")
    both = store.add([b"c" * 30, b"d" * 30], "webp")
    assert store.get(old) is None
    assert store.get(new) is not None
    assert [store.get(name)[0].data for name in both] == [b"c" * 30, b"d" * 30]
    assert store.nbytes == 100
    with pytest.raises(errors.Unavailable, match="b64_json"):
        store.add([b"e" * 60, b"f" * 60], "png")
    assert len(store) == 3
    assert len({*both, old, new}) == 4
    assert all(len(name) > 32 for name in both)


async def test_a_quiet_stream_sends_comments(gateway):
    released = asyncio.Event()

    async def wait(request):
        yield event(queued=gateway_pb2.Queued(cold=True))
        await released.wait()
        async for each in draw(request):
            yield each

    gateway.script = wait
    limits = HttpLimits(stream=StreamLimits(keepalive_seconds=0.001))
    scope, receive = _request({"prompt": "x", "stream": True})
    sent: list[bytes] = []

    async def send(message):
        sent.append(message.get("body", b""))
        if sent.count(b": waiting\n\n") == 3:
            released.set()

    await build_app(gateway, limits=limits)(scope, receive, send)
    assert b"image_generation.completed" in b"".join(sent)
    assert sent[-1] == b""


async def test_a_client_that_does_not_read_its_stream_is_left(gateway):
    limits = HttpLimits(stream=StreamLimits(send_seconds=0.01))
    scope, receive = _request({"prompt": "x", "stream": True, "partial_images": 3})

    async def send(message):
        if message.get("body"):
            await asyncio.Event().wait()

    await build_app(gateway, limits=limits)(scope, receive, send)
    assert gateway.closed.is_set()
    assert gateway.open == 0


async def test_a_client_that_leaves_while_it_sends_is_no_failure(gateway: FakeGateway):
    scope, _ = _request({})
    messages = iter(
        [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    )
    statuses = []

    async def receive():
        return next(messages)

    async def send(message):
        statuses.append(message.get("status"))

    app = build_app(gateway)
    await app(scope, receive, send)
    assert statuses[0] == 499
    assert app.state.budget.used == 0
    assert gateway.requests == []


def _request(body: dict[str, Any]):
    """An ASGI scope and receive for a generation whose client then stays."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": GENERATIONS,
        "raw_path": GENERATIONS.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "server": ("gateway", 80),
        "scheme": "http",
        "root_path": "",
    }
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        return await asyncio.get_running_loop().create_future()

    return scope, receive
