# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Every failure as OpenAI's error body, with the status that makes the `openai` package raise
the matching exception and retry only what a retry can mend."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from fastapi import Response
from pydantic import BaseModel

from kubediffusion.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidInput,
    KubeDiffusionError,
    Overloaded,
    Unauthenticated,
)


class Refused(InvalidInput):
    """A request that HTTP has its own status for: a body too large or too slow, another method."""

    def __init__(self, message: str, *, status: int, reason: str) -> None:
        super().__init__(message, reason=reason)
        self.http_status = status


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """OpenAI's error body."""

    error: ErrorDetail


def error_body(error: KubeDiffusionError) -> dict[str, Any]:
    """`error` in OpenAI's words; `code` is its reason in snake case."""
    message = error.message
    if error.field and error.field not in message:
        message = f"{error.field}: {message}"
    detail = ErrorDetail(
        message=message,
        type=_type(error.http_status),
        param=error.field or None,
        code=re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", error.reason).lower(),
    )
    return {"error": detail.model_dump()}


def error_response(error: KubeDiffusionError) -> Response:
    content = json.dumps(error_body(error)).encode()
    return Response(
        content, error.http_status, headers=_headers(error), media_type="application/json"
    )


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return "rate_limit_error" if status == 429 else "invalid_request_error"


def _headers(error: KubeDiffusionError) -> dict[str, str]:
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded):
        seconds = max(0.0, error.retry_after)
        headers["Retry-After"] = str(max(1, math.ceil(seconds)))
        headers["Retry-After-Ms"] = str(math.ceil(seconds * 1000))
    elif isinstance(error, Conflict | DeadlineExceeded):
        # The package retries both by itself: the first cannot succeed, the second would make a
        # caller whose time is up wait for it twice more.
        headers["X-Should-Retry"] = "false"
    elif isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    elif error.http_status in (408, 413):
        # What is left of the body is not wanted.
        headers["Connection"] = "close"
    return headers
