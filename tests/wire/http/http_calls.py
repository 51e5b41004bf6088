# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Calls to the application in the test's own event loop, and what an error of it looks like."""

from __future__ import annotations

from typing import Any

import httpx

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
