# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Fields, bodies and forms of requests: how they are read, and how each is refused."""

from __future__ import annotations

import base64
import gzip

import pytest
from http_calls import EDITS, GENERATIONS, check_error
from http_fakes import draw, png

from kubediffusion import errors

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


async def test_what_was_done_otherwise_than_one_may_think_is_said(http, gateway):
    async def warning(request):
        async for each in draw(request):
            if each.WhichOneof("kind") == "image":
                each.image.warnings.append("only the beginning was read")
            yield each

    (image,) = (await http.post(GENERATIONS, json={"prompt": "x"})).json()["data"]
    assert "warnings" not in image
    gateway.script = warning
    (image,) = (await http.post(GENERATIONS, json={"prompt": "x"})).json()["data"]
    assert image["warnings"] == ["only the beginning was read"]
    stream = (await http.post(GENERATIONS, json={"prompt": "x", "stream": True})).text
    assert '"warnings": ["only the beginning was read"]' in stream
