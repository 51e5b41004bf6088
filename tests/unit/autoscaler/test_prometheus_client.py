# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The client over real HTTP, with servers that answer well, badly, late, or not at all."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import parse_qs

import pytest
from aiohttp import web

from kubediffusion.errors import InvalidInput
from kubediffusion_operator.autoscaler.prometheus import Prometheus, PrometheusUnavailable

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/prefix/api/v1/query", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield f"http://127.0.0.1:{port}/prefix/"
    finally:
        await runner.cleanup()


def vector(*series: tuple[dict[str, str], str], **more: object) -> dict[str, object]:
    result = [{"metric": labels, "value": [1700000000.123, value]} for labels, value in series]
    return {"status": "success", "data": {"resultType": "vector", "result": result}, **more}


async def asked(body: object, status: int = 200) -> object:
    """What a query brings where the server answers with this."""

    async def handler(_: web.Request) -> web.Response:
        text = body if isinstance(body, str) else json.dumps(body)
        return web.Response(text=text, status=status)

    async with server(handler) as url, Prometheus(url) as prometheus:
        return await prometheus.query("up")


async def test_a_vector_with_all_the_numbers_there_are():
    values = ("1", "0.5", "NaN", "+Inf", "x")
    answer = await asked(vector(*(({"i": v}, v) for v in values), warnings=["w"], infos=["i"]))
    found = {each.labels["i"]: each.value for each in answer.samples}
    assert (found["1"], found["0.5"], found["+Inf"]) == (1.0, 0.5, math.inf)
    assert math.isnan(found["NaN"])
    assert math.isnan(found["x"])
    assert answer.warnings == ("w",)


async def test_nothing_found_is_an_answer():
    assert (await asked(vector())).samples == ()


@pytest.mark.parametrize(
    ("body", "status", "reason", "word"),
    [
        ({"status": "error", "errorType": "bad_data", "error": "parse error"}, 400,
         "QueryFailed", "parse error"),
        ({"status": "error", "errorType": "timeout", "error": "query timed out"}, 503,
         "QueryFailed", "query timed out"),
        ("<html>login</html>", 200, "PrometheusNonsense", "does not speak"),
        ("", 200, "PrometheusNonsense", "does not speak"),
        ("{}", 200, "PrometheusNonsense", "does not speak"),
        ("no", 401, "PrometheusRefused", "HTTP 401"),
        ("bad gateway", 502, "PrometheusRefused", "HTTP 502"),
        ("", 302, "PrometheusRefused", "HTTP 302"),
        ({"status": "success", "data": {"resultType": "matrix", "result": []}}, 200,
         "PrometheusNonsense", "matrix"),
        ({"status": "success", "data": {"resultType": "scalar", "result": [1, "2"]}}, 200,
         "PrometheusNonsense", "does not speak"),
    ],
)  # fmt: skip
async def test_what_is_no_answer_says_what_it_is(body, status, reason, word):
    with pytest.raises(PrometheusUnavailable) as caught:
        await asked(body, status)
    assert caught.value.reason == reason
    assert word in caught.value.message


async def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    messages = set()
    async with Prometheus(f"http://127.0.0.1:{port}") as prometheus:
        for _ in range(2):
            with pytest.raises(PrometheusUnavailable) as caught:
                await prometheus.query("up")
            assert caught.value.reason == "PrometheusUnreachable"
            messages.add(caught.value.message)
    assert len(messages) == 1, "a condition would be written again and again"


@pytest.mark.parametrize("url", ["http://", "nowhere", "http://[::1", "ftp://host"])
async def test_an_address_that_is_none(url):
    async with Prometheus(url) as prometheus:
        with pytest.raises(PrometheusUnavailable) as caught:
            await prometheus.query("up")
    assert caught.value.reason == "PrometheusUnreachable"


async def test_a_server_that_never_answers():
    begun, end = asyncio.Event(), asyncio.Event()

    async def hang(_: web.Request) -> web.Response:
        begun.set()
        await end.wait()
        return web.Response()

    async with server(hang) as url, Prometheus(url, timeout=0.2) as prometheus:
        with pytest.raises(PrometheusUnavailable) as caught:
            await prometheus.query("up")
        assert begun.is_set()
        end.set()
    assert caught.value.reason == "PrometheusTimeout"
    assert "within 0.2 s" in caught.value.message


async def test_the_query_and_a_token_that_is_renewed(tmp_path):
    token = tmp_path / "token"
    seen: list[tuple[str, str]] = []

    async def handler(request: web.Request) -> web.Response:
        form = parse_qs((await request.read()).decode())
        seen.append((form["query"][0], request.headers["Authorization"]))
        return web.json_response(vector())

    async with (
        server(handler) as url,
        Prometheus(url, bearer_token_file=str(token)) as prometheus,
    ):
        with pytest.raises(PrometheusUnavailable) as caught:
            await prometheus.query("up")
        assert caught.value.reason == "PrometheusRefused"
        for secret in ("one", "two"):
            token.write_text(f"{secret}\n")
            await prometheus.query('up{job="x+y"}')
    assert seen == [('up{job="x+y"}', "Bearer one"), ('up{job="x+y"}', "Bearer two")]


def test_an_authority_that_cannot_be_read(tmp_path):
    file = tmp_path / "ca.crt"
    with pytest.raises(InvalidInput, match=r"prometheus\.caFile"):
        Prometheus("https://p", ca_file=str(file))
    file.write_text("no certificate")
    with pytest.raises(InvalidInput):
        Prometheus("https://p", ca_file=str(file))
