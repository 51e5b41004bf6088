# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Headers, keys, health and bugs: every error comes in OpenAI's error body."""

from __future__ import annotations

import json

import pytest
from http_calls import EDITS, GENERATIONS, check_error, client_of
from http_fakes import event, workflow

from kubediffusion.gateway.http import build_app
from kubediffusion.v1alpha1 import gateway_pb2


async def test_a_bug_is_an_error_body_that_tells_nothing_of_the_inside(http, gateway, caplog):
    async def crash(request):
        raise ZeroDivisionError("secret detail")
        yield

    gateway.script = crash
    for stream in (False, True):
        caplog.clear()
        answer = await http.post(GENERATIONS, json={"prompt": "x", "stream": stream})
        error = check_error(answer, 500)
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] in error["message"]
        assert error["type"] == "server_error"
        assert "secret detail" in caplog.text


async def test_a_bug_in_the_middle_of_a_stream_is_an_error_event(http, gateway):
    async def crash(request):
        yield event(queued=gateway_pb2.Queued())
        raise ZeroDivisionError("secret detail")

    gateway.script = crash
    answer = await http.post(GENERATIONS, json={"prompt": "x", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    name, data = answer.text.strip().split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "internal"
    assert "secret" not in answer.text


async def test_unknown_urls_and_methods_get_the_error_body(http):
    for method, path, status in [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/nope", 404),
        ("POST", "/v1/images/variations", 404),
        ("GET", "/images/nope.png", 404),
        ("GET", "/images/../../etc/passwd", 404),
        ("GET", GENERATIONS, 405),
        ("DELETE", "/v1/models", 405),
    ]:
        check_error(await http.request(method, path), status)


@pytest.mark.parametrize("host", ["[", "a b", "x:y:z", "[::1", "", "example.com:99999999"])
async def test_an_odd_host_header_is_no_failure_of_the_server(http, host):
    for method, path, body in [
        ("GET", "/nowhere", None),
        ("POST", GENERATIONS, {"prompt": "x", "response_format": "url"}),
    ]:
        answer = await http.request(method, path, json=body, headers={"Host": host})
        assert answer.status_code < 500


async def test_a_request_id_is_echoed_or_made(http):
    answer = await http.get("/healthz", headers={"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    for odd in ("two words", "x" * 200, "ü".encode()):
        made = (await http.get("/healthz", headers={"X-Request-Id": odd})).headers["x-request-id"]
        assert made.startswith("req-")
    for stream in (False, True):
        # The id under which the gateway logs the request.
        answer = await http.post(GENERATIONS, json={"prompt": "x", "stream": stream})
        assert answer.headers["x-request-id"] == "r-1"


async def test_a_bad_idempotency_key_is_refused_and_a_bad_traceparent_left_out(http, gateway):
    for key in ("two words", "x" * 256):
        answer = await http.post(
            GENERATIONS, json={"prompt": "x"}, headers={"Idempotency-Key": key}
        )
        assert check_error(answer, 400)["param"] == "Idempotency-Key"
    await http.post(GENERATIONS, json={"prompt": "x"}, headers={"traceparent": "junk"})
    assert gateway.last.traceparent == ""


async def test_the_safety_identifier_comes_before_the_user(http, gateway):
    await http.post(GENERATIONS, json={"prompt": "x", "user": "old", "safety_identifier": "new"})
    assert gateway.last.tenant == "new"


async def test_without_a_key_nothing_is_read(gateway):
    app = build_app(gateway, api_keys=frozenset({"k"}))
    async with client_of(app) as http:
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic k"}):
            answer = await http.post(GENERATIONS, content=b"x" * 1000, headers=headers)
            assert check_error(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
            check_error(await http.get("/v1/models", headers=headers), 401)
        for open_path in ("/healthz", "/readyz"):
            assert (await http.get(open_path)).status_code == 200
        good = await http.get("/v1/models", headers={"Authorization": "bearer k"})
        assert good.status_code == 200


async def test_an_empty_key_is_no_key(gateway):
    with pytest.raises(ValueError, match="empty"):
        build_app(gateway, api_keys=frozenset({""}))
    async with client_of(build_app(gateway, api_keys=frozenset())) as http:
        check_error(await http.get("/v1/models", headers={"Authorization": "Bearer "}), 401)


async def test_readiness_asks_for_workflows_and_not_for_running_models(http, gateway):
    gateway.workflows = [workflow("shapes", ready=False)]
    answer = await http.get("/readyz")
    assert (answer.status_code, answer.json()["workflows"]) == (200, {"shapes": False})
    gateway.workflows = []
    check_error(await http.get("/readyz"), 503)
    assert (await http.get("/healthz")).status_code == 200


async def test_a_public_url_leads_answers_by_url(gateway):
    app = build_app(gateway, public_url="https://images.example.com/draw/")
    async with client_of(app) as http:
        answer = await http.post(GENERATIONS, json={"prompt": "x", "response_format": "url"})
    assert answer.json()["data"][0]["url"].startswith("https://images.example.com/draw/images/")


async def test_the_schema_of_the_api_is_whole(http):
    schema = (await http.get("/openapi.json")).json()
    assert schema["openapi"].startswith("3.1")
    known = schema["components"]["schemas"]
    text = json.dumps(schema)
    references = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert references <= set(known)
    assert "$defs" not in text
    bodies = {
        path: next(iter(schema["paths"][path]["post"]["requestBody"]["content"].items()))
        for path in (GENERATIONS, EDITS)
    }
    assert bodies[GENERATIONS][0] == "application/json"
    assert bodies[EDITS][0] == "multipart/form-data"
    assert known["GenerationFields"]["required"] == ["prompt"]
    assert set(known["EditFields"]["required"]) == {"prompt", "image"}
    assert (await http.get("/docs")).status_code == 200
