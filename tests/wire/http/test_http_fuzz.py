# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Whatever is sent, the server answers in the words of the API and keeps nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import httpx
import pytest
from http_fakes import FakeGateway, png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kubediffusion.gateway.http import HttpLimits, build_app
from kubediffusion.gateway.openai.fields import EditFields, GenerationFields

FAST = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["auto", "64x64", "png", "url", "b64_json", "AAAA", "data:;base64,AAAA"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["edges", "image", "scale", "tiles"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
NAMES = sorted(set(GenerationFields.model_fields) | set(EditFields.model_fields))
OBJECTS = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), VALUES, max_size=6)


class Fuzzed:
    """One application and its client, for many requests in turn."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self.gateway = FakeGateway()
        self.app = build_app(self.gateway, limits=HttpLimits(body_bytes=1 << 20))
        # The transport raises whatever the application lets out.
        transport = httpx.ASGITransport(self.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway")

    def post(self, path: str, content: bytes, kind: str) -> None:
        """Sends and checks."""
        headers = {"Content-Type": kind}
        answer = self._runner.run(self.client.post(path, content=content, headers=headers))
        assert answer.status_code in (200, 400, 404, 415)
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["message"]
            assert error["code"]
            assert len(answer.content) < 4000
        assert self.gateway.open == 0
        assert self.app.state.budget.used == 0
        self.gateway.requests.clear()


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Fuzzed]:
    with asyncio.Runner() as runner:
        fuzzed = Fuzzed(runner)
        yield fuzzed
        runner.run(fuzzed.client.aclose())


@FAST
@given(body=OBJECTS, with_prompt=st.booleans())
def test_no_json_object_breaks_generations(fuzzed, body, with_prompt):
    if with_prompt:
        body = {"prompt": "x"} | body
    content = json.dumps(body).encode()
    fuzzed.post("/v1/images/generations", content, "application/json")


@FAST
@given(content=st.binary(max_size=200), kind=st.sampled_from(["json", "json;charset=utf-8"]))
def test_no_bytes_break_generations(fuzzed, content, kind):
    fuzzed.post("/v1/images/generations", content, f"application/{kind}")


PARTS = st.lists(
    st.tuples(
        st.sampled_from([*NAMES, "image[]", "loras[a]", "inputs[tiles]", "control[edges][image]"])
        | st.text(st.characters(codec="ascii", categories=["L", "P"]), min_size=1, max_size=12),
        st.tuples(
            st.none() | st.just("a.png"),
            st.binary(max_size=30) | st.sampled_from([png(1), b"1", b"true", b'{"a": 1}']),
        ),
    ),
    max_size=6,
)


@FAST
@given(parts=PARTS, complete=st.booleans())
def test_no_form_breaks_edits(fuzzed, parts, complete):
    if complete:
        parts = [*parts, ("prompt", (None, b"x")), ("image", ("a.png", png(1)))]
    request = httpx.Request("POST", "http://gateway", files=parts or {"x": b""})
    fuzzed.post("/v1/images/edits", request.read(), request.headers["content-type"])


@FAST
@given(
    head=st.binary(max_size=60),
    tail=st.binary(max_size=60),
    boundary=st.sampled_from(["x", '"x"', "x; charset=utf-8"]),
)
def test_no_bytes_break_edits(fuzzed, head, tail, boundary):
    part = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + head + b"\r\n--x"
    kind = f"multipart/form-data; boundary={boundary}"
    for content in (head, part, part + tail, head + part + b"--" + tail):
        fuzzed.post("/v1/images/edits", content, kind)
