# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from http_fakes import FakeGateway, serving

from kubediffusion.gateway.http import build_app


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[str, FakeGateway]]:
    """One server for all tests that speak to it over a socket."""
    gateway = FakeGateway()
    with serving(build_app(gateway)) as url:
        yield url, gateway


@pytest.fixture
def served(server: tuple[str, FakeGateway]) -> tuple[str, FakeGateway]:
    """The server's address and its gateway, as good as new."""
    url, gateway = server
    gateway.__init__()
    return url, gateway


@pytest.fixture
def client(served: tuple[str, FakeGateway]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def drawn(served: tuple[str, FakeGateway]) -> FakeGateway:
    """The gateway behind `client`."""
    return served[1]


@pytest.fixture
async def http(gateway: FakeGateway):
    """A client in the same event loop as the application: an answer has come when all is done."""
    transport = httpx.ASGITransport(build_app(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client
