# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Structured logs on the standard library's logging.

    configure("INFO", json=True, node="denoiser-0")
    with context(request=request_id, workflow="sd3"):
        log.info("denoising done", extra={"steps": 28})

Every record made inside `context`, in this task or in a thread that it started with
`asyncio.to_thread`, carries its fields. As text a record is one line, ``time level logger: message
key=value …``; as JSON one object.
"""

from __future__ import annotations

import json as jsonlib
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TextIO

_NONE: Mapping[str, object] = MappingProxyType({})
_context: ContextVar[Mapping[str, object]] = ContextVar("kubediffusion_log_context", default=_NONE)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@contextmanager
def context(**fields: object) -> Iterator[None]:
    """Adds fields to every record made inside; inner ones win."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def configure(
    level: str = "INFO", json: bool = False, stream: TextIO | None = None, **fields: object
) -> None:
    """Logs of the whole process go to `stream` (stderr), with `fields` in each record.

    Calling it again replaces what it did before; other handlers are left alone.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json(fields) if json else _Text(fields))
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old.formatter, _Structured):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    # These say at INFO what our own records say better.
    for noisy in ("httpx", "httpcore", "urllib3", "asyncio", "filelock"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


class _Structured(logging.Formatter):
    def __init__(self, fields: Mapping[str, object]) -> None:
        super().__init__()
        self._fields = fields

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        extra = {k: v for k, v in vars(record).items() if k not in _STANDARD}
        return {**self._fields, **_context.get(), **extra}

    def trouble(self, record: logging.LogRecord) -> str:
        text = self.formatException(record.exc_info) if record.exc_info else ""
        return "\n".join(filter(None, [text, record.stack_info]))


class _Text(_Structured):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {k}={_plain(v)}" for k, v in self.fields(record).items())
        # One record is one line, so that nobody can forge another with a newline in a prompt.
        message = record.getMessage().replace("\n", "\\n").replace("\r", "\\r")
        line = f"{_time(record)} {record.levelname} {record.name}: {message}{fields}"
        trouble = self.trouble(record)
        return f"{line}\n{trouble}" if trouble else line


class _Json(_Structured):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            **self.fields(record),
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        trouble = self.trouble(record)
        if trouble:
            entry["exception"] = trouble
        return jsonlib.dumps(entry, default=str, ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    when = datetime.fromtimestamp(record.created, UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    bare = text.isprintable() and text and not set(text) & set(' "=')
    return text if bare else jsonlib.dumps(text, ensure_ascii=False)
