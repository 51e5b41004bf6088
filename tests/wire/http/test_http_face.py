# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Bad requests, headers, limits and health: what is refused is refused in OpenAI's error body."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
from typing import Any

import httpx
import pytest
from http_fakes import FakeGateway, draw, event, png, workflow

from kubediffusion import errors
from kubediffusion.gateway.http import HttpLimits, build_app
from kubediffusion.gateway.openai.files import ImageStore
from kubediffusion.gateway.openai.routes import StreamLimits
from kubediffusion.v1alpha1 import gateway_pb2

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"


def client_of(app, **kwargs) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, **kwargs)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


def check_error(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, which must be whole."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert isinstance(error["code"], str)
    assert answer.headers["x-request-id"]
    return error


# Each: what is sent beside a prompt, the field that the error names, and words of its message.
BAD_FIELDS = [
    ({"promt": "x"}, "promt", "did you mean 'prompt'"),
    ({"zzz": 1}, "zzz", "'inputs'"),
    ({"x" * 10_000: 1}, "x" * 64, "unknown parameter"),
    ({"prompt": 3}, "prompt", "string"),
    ({"prompt": "x" * 32_001}, "prompt", "32000"),
    ({"n": 0}, "n", "1"),
    ({"n": 11}, "n", "10"),
    ({"n": "3"}, "n", "integer"),
    ({"n": 1.0}, "n", "integer"),
    ({"n": True}, "n", "integer"),
    ({"size": "huge"}, "size", "WIDTHxHEIGHT"),
    ({"size": "0x64"}, "size", "WIDTHxHEIGHT"),
    ({"size": "64x64\n"}, "size", "WIDTHxHEIGHT"),
    ({"size": "64x64", "inputs": {"width": 32}}, "inputs.width", "size"),
    ({"response_format": "png"}, "response_format", "'b64_json' or 'url'"),
    ({"output_format": "svg"}, "output_format", "'png', 'jpeg' or 'webp'"),
    ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
    ({"output_compression": 50}, "output_compression", "lossless"),
    ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "100"),
    ({"background": "transparent"}, "background", "no transparency"),
    ({"partial_images": 2}, "partial_images", "stream=true"),
    ({"stream": True, "partial_images": 4}, "partial_images", "3"),
    ({"stream": True, "response_format": "url"}, "response_format", "b64_json"),
    ({"stream": "true"}, "stream", "boolean"),
    ({"svg": {"model": "x"}}, "svg", "bitmaps"),
    ({"frame_count": 4}, "frame_count", "animations"),
    ({"mask": "x"}, "mask", "unknown parameter"),
    ({"model": "nope"}, "model", "'shapes'"),
    ({"seed": -1}, "seed", "0"),
    ({"seed": 2**63}, "seed", str(2**63 - 1)),
    ({"steps": 4, "num_inference_steps": 4}, "num_inference_steps", "steps"),
    ({"guidance": 1, "guidance_scale": 1}, "guidance_scale", "guidance"),
    ({"guidance": "7"}, "guidance", "number"),
    ({"loras": {"pastel": "much"}}, "loras.pastel", "number"),
    ({"loras": ["pastel"]}, "loras", "object"),
    ({"loras": '{"pastel": 1}'}, "loras", "object"),
    ({"control": {"edges": {}}}, "control.edges.image", "missing"),
    ({"control": {"edges": {"image": "!"}}}, "control.edges.image", "base64"),
    ({"control": {"edges": {"image": ""}}}, "control.edges.image", "empty"),
    ({"control": {"edges": {"image": "http://x/y.png"}}}, "control.edges.image", "not fetch"),
    ({"control": {"edges": {"image": "file:///etc/passwd"}}}, "control.edges.image", "not fetch"),
    ({"control": {"edges": {"image": "AAAA", "scal": 1}}}, "control.edges.scal", "'scale'"),
    ({"inputs": {"texture": "/etc/passwd.png"}}, "inputs.texture", "base64"),
    ({"inputs": {"texture": 5}}, "inputs.texture", "base64"),
    ({"inputs": {"tiles": [1]}}, "inputs.tiles", "must be"),
    ({"inputs": {"tiles": {}}}, "inputs.tiles", "must be"),
    ({"inputs": {"tiles": 2**63}}, "inputs.tiles", "must be"),
    ({"inputs": {"": 1}}, "inputs", "at least 1"),
    ({"deadline_ms": 0}, "deadline_ms", "1"),
    ({"priority": 10**9}, "priority", "1000"),
    ({"numerics": "sloppy"}, "numerics", "'exact' or 'fast'"),
    ({"budget": 0}, "budget", "0"),
    ({"user": "x" * 257}, "user", "256"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD_FIELDS)
async def test_a_bad_field_is_named_and_nothing_is_drawn(http, gateway, fields, param, words):
    answer = await http.post(GENERATIONS, json={"prompt": "x"} | fields)
    error = check_error(answer, 404 if fields == {"model": "nope"} else 400)
    assert error["param"].startswith(param)
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(answer.content) < 1000
    assert gateway.requests == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b'{"prompt": "x", "guidance": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"prompt": "x", "inputs": {"softness": NaN}}', "invalid_input"),
        (b'{"prompt": "x", "inputs": {"softness": 1e999}}', "invalid_input"),
        (b'{"prompt": "x", "inputs": [' + b"1," * 100_001 + b"1]}", "invalid_json"),
        (b"[]", "invalid_input"),
        (b"null", "invalid_input"),
        (b'{"model": "shapes"}', "missing_parameter"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_a_body_that_is_no_request_is_refused(http, gateway, body, code):
    answer = await http.post(
        GENERATIONS, content=body, headers={"Content-Type": "application/json"}
    )
    assert check_error(answer, 400)["code"] == code
    assert gateway.requests == []


@pytest.mark.parametrize(
    ("form", "param", "words"),
    [
        ({"data": {"prompt": "x"}}, "image", "missing"),
        ({"files": {"image": png(1)}}, "prompt", "missing"),
        ({"files": {"image": b""}, "data": {"prompt": "x"}}, "image.0", "empty"),
        ({"data": {"prompt": "x", "image": "http://x/y.png"}}, "image.0", "not fetch"),
        (
            {"files": [("image[]", png(1)), ("image[]", png(2))], "data": {"prompt": "x"}},
            "image",
            "one image",
        ),
        ({"files": {"image": b"1", "mask": b"2"}, "data": {"prompt": "x"}}, "mask", "no mask"),
        ({"files": {"image": b"1", "markup": b"2"}, "data": {"prompt": "x"}}, "markup", "draw"),
        ({"files": {"image": b"1"}, "data": {"prompt": ["x", "y"]}}, "prompt", "twice"),
        ({"files": {"image": b"1"}, "data": {"prompt": "x", "n": "two"}}, "n", "integer"),
        ({"files": {"image": b"1"}, "data": {"prompt": "x", "loras": "{"}}, "loras", "JSON object"),
        (
            {"files": {"image": b"1"}, "data": {"prompt": "x", "inputs": "," * 100_001}},
            "inputs",
            "too many",
        ),
        (
            {"files": {"image": b"1"}, "data": {"prompt": "x", "loras": "1", "loras[a]": "1"}},
            "loras",
            "two ways",
        ),
        ({"files": {"image": b"1"}, "data": {"prompt": "x", "a]": "1"}}, "a]", "malformed"),
        (
            {"files": {"image": b"1"}, "data": {"prompt": "x", "inputs[tiles]": "1.5"}},
            "inputs.tiles",
            "integer",
        ),
        (
            {"files": {"image": b"1"}, "data": {"prompt": "x", "inputs[mirrored]": "maybe"}},
            "inputs.mirrored",
            "flag",
        ),
        (
            {"files": {"image": b"1"}, "data": {"prompt": "x", "inputs[softness]": "nan"}},
            "inputs.softness",
            "must be",
        ),
        (
            {"files": {"image": b"1", "inputs[tiles]": b"1"}, "data": {"prompt": "x"}},
            "inputs.tiles",
            "no image",
        ),
        (
            {"files": {"image": b"1"}, "data": {"prompt": "x", "inputs": '{"a": "\\ud800"}'}},
            "inputs.a",
            "must be",
        ),
    ],
)
async def test_a_bad_form_is_refused_by_field(http, gateway, form, param, words):
    # Fields beside no file would go out as another media type.
    if "files" not in form:
        form = {"files": [(k, (None, v)) for k, v in form["data"].items()]}
    error = check_error(await http.post(EDITS, **form), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert gateway.requests == []


async def test_a_form_may_carry_control_images_as_files_and_tables_as_json(http, gateway):
    answer = await http.post(
        EDITS,
        files={"image": png(1), "control[edges][image]": png(2), "inputs[texture]": png(3)},
        data={"prompt": "x", "loras": '{"pastel": 2}', "n": "2", "control[edges][scale]": "0.5"},
    )
    assert answer.status_code == 200
    inputs = gateway.last.inputs
    assert [inputs[k].blob for k in ("image", "control.edges", "texture")] == [
        png(1),
        png(2),
        png(3),
    ]
    assert inputs["control.edges.scale"].number == 0.5
    assert dict(gateway.last.loras) == {"pastel": 2.0}
    assert gateway.last.n == 2


async def test_a_mask_goes_to_a_workflow_that_declares_one(http, gateway):
    gateway.workflows[0].inputs.add(name="mask", type="image")
    answer = await http.post(EDITS, files={"image": png(1), "mask": png(2)}, data={"prompt": "x"})
    assert answer.status_code == 200
    assert gateway.last.inputs["mask"].blob == png(2)


@pytest.mark.parametrize("head", ["", "data:image/png;base64,"])
async def test_base64_may_be_a_data_url_and_may_be_folded(http, gateway, head):
    text = head + base64.encodebytes(png(5)).decode()
    answer = await http.post(GENERATIONS, json={"prompt": "x", "inputs": {"texture": text}})
    assert answer.status_code == 200
    assert gateway.last.inputs["texture"].blob == png(5)


async def test_null_means_absent(http, gateway):
    nothing = dict.fromkeys(["n", "size", "stream", "seed", "loras", "svg", "quality", "user"])
    answer = await http.post(GENERATIONS, json={"prompt": "x"} | nothing)
    assert answer.status_code == 200
    assert "x-kubediffusion-ignored" not in answer.headers
    assert set(gateway.last.inputs) == {"prompt"}


async def test_fields_that_mean_nothing_here_are_ignored_and_listed(http):
    answer = await http.post(
        GENERATIONS,
        json={"prompt": "x", "quality": "hd", "style": "vivid", "moderation": "low"},
    )
    assert answer.status_code == 200
    assert answer.headers["x-kubediffusion-ignored"] == "moderation, quality, style"


async def test_errors_name_the_field_as_the_caller_sent_it(http, gateway):
    for field, body, expected in [
        ("inputs.width", {"size": "65x64"}, "size"),
        ("inputs.steps", {"num_inference_steps": 500}, "num_inference_steps"),
        ("inputs.control.edges", {"control": {"edges": {"image": "AAAA"}}}, "control.edges.image"),
        ("inputs.tiles", {"inputs": {"tiles": 4}}, "inputs.tiles"),
        ("inputs.unsent", {}, "inputs.unsent"),
        ("workflow", {}, "model"),
    ]:

        async def refuse(request, field=field):
            raise errors.InvalidInput("out of bounds", field=field, reason="OutOfBounds")
            yield

        gateway.script = refuse
        for stream in (False, True):
            answer = await http.post(GENERATIONS, json={"prompt": "x", "stream": stream} | body)
            error = check_error(answer, 400)
            assert (error["param"], error["code"]) == (expected, "out_of_bounds")


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


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/json; charset=punycode"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
async def test_a_body_of_another_kind_is_refused(http, headers):
    body = gzip.compress(b'{"prompt": "x"}')
    check_error(await http.post(GENERATIONS, content=body, headers=headers), 415)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"garbage"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n--x--"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="im'),
        ("multipart/form-data; boundary=" + "x" * 5000, b"--x"),
    ],
)
async def test_a_torn_form_is_refused(http, kind, body):
    answer = await http.post(EDITS, content=body, headers={"Content-Type": kind})
    check_error(answer, 400)


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
