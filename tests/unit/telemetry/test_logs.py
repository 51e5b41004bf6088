# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from kubediffusion.telemetry.logging import configure, context

log = logging.getLogger("kubediffusion.test")


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def records(out: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_json_record_carries_the_fields_of_the_process_the_context_and_the_call(
    out: io.StringIO,
) -> None:
    configure("info", json=True, stream=out, node="n-1")
    with context(request="r", workflow="sd3"), context(request="inner"):
        log.info("done in %d", 5, extra={"steps": 28})
    (record,) = records(out)
    assert record.pop("time")
    assert record == {
        "node": "n-1",
        "request": "inner",
        "workflow": "sd3",
        "steps": 28,
        "level": "INFO",
        "logger": "kubediffusion.test",
        "message": "done in 5",
    }


async def test_tasks_and_their_threads_keep_their_own_context(out: io.StringIO) -> None:
    configure("info", json=True, stream=out)

    async def handle(request: str) -> None:
        with context(request=request):
            await asyncio.sleep(0)
            await asyncio.to_thread(log.info, request)

    await asyncio.gather(handle("a"), handle("b"))
    log.info("outside")
    seen = {record["message"]: record.get("request") for record in records(out)}
    assert seen == {"a": "a", "b": "b", "outside": None}


def test_a_text_record_is_one_line_whatever_a_prompt_holds(out: io.StringIO) -> None:
    configure("info", stream=out)
    log.info("prompt %s", "x\n2026 ERROR forged", extra={"text": 'a "b"\nc', "n": 3})
    (line,) = out.getvalue().splitlines()
    assert "prompt x\\n2026 ERROR forged" in line
    assert line.endswith(r'text="a \"b\"\nc" n=3')


def test_an_exception_is_kept_whole(out: io.StringIO) -> None:
    configure("info", json=True, stream=out)
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("failed")
    (record,) = records(out)
    assert "ValueError: why" in str(record["exception"])


def test_configuring_again_replaces_and_the_level_holds(out: io.StringIO) -> None:
    first = io.StringIO()
    configure("debug", stream=first)
    configure("warning", stream=out)
    log.info("quiet")
    log.warning("loud")
    assert first.getvalue() == ""
    assert "loud" in out.getvalue()
    assert "quiet" not in out.getvalue()
