# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What `helm test` runs, against real gateways: it draws, and where it cannot it says why."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kubediffusion.gateway.config import GatewayConfig
from kubediffusion.gateway.core import Gateway
from kubediffusion.gateway.server import Doors, serve
from kubediffusion.local import LocalRuntime
from tests.unit.chart.rendering import ROOT, Helm

KEYS = frozenset({"first-key", "second-key"})


class HelmTest:
    """The pod of `helm test`, as a process of this machine."""

    def __init__(self, helm: Helm) -> None:
        keys = {"gateway": {"apiKeys": {"keys": sorted(KEYS)}}}
        (pod,) = helm.render(keys).get("Pod", "test")["spec"]["containers"]
        assert pod["command"] == ["python"]
        self._arguments: list[str] = pod["args"]
        self._values = {one["name"]: one["value"] for one in pod["env"] if "value" in one}
        self._names = {one["name"] for one in pod["env"]}

    def run(self, gateway: str, **changed: str) -> subprocess.CompletedProcess[str]:
        environment = {**self._values, "API_KEYS": "first-key\nsecond-key", "GATEWAY": gateway}
        environment |= changed
        assert environment.keys() <= self._names
        command = [sys.executable, *self._arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="session")
def helm_test(helm: Helm) -> HelmTest:
    return HelmTest(helm)


@pytest.mark.usefixtures("fork_server")
async def test_it_draws_an_image(helm_test: HelmTest) -> None:
    workflow = ROOT / "examples/tiny-sd3.yaml"
    async with LocalRuntime([workflow]) as runtime:
        await runtime.ready()
        doors = Doors(http="127.0.0.1:0")
        async with serve(runtime.gateway, doors, api_keys=KEYS) as addresses:
            done = await asyncio.to_thread(helm_test.run, f"http://{addresses.http}")
    assert done.returncode == 0, done.stderr
    assert "drawing with tiny-sd3: a red circle above a blue square" in done.stdout
    assert "a PNG of" in done.stdout


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "no workflow is served: apply one, such as examples/tiny-sd3.yaml"),
        ({"API_KEYS": "stolen"}, "the gateway refuses the API key"),
        ({"WORKFLOW": "sd3"}, "the gateway answered 404"),
    ],
)
async def test_it_says_what_is_wrong(
    helm_test: HelmTest, changed: dict[str, str], words: str
) -> None:
    gateway = Gateway(GatewayConfig())
    await gateway.start()
    try:
        async with serve(gateway, Doors(http="127.0.0.1:0"), api_keys=KEYS) as addresses:
            url = f"http://{addresses.http}"
            done = await asyncio.to_thread(helm_test.run, url, **changed)
    finally:
        await gateway.stop()
    assert done.returncode != 0
    assert words in done.stderr


def test_it_waits_for_a_gateway_only_so_long(helm_test: HelmTest) -> None:
    done = helm_test.run("http://127.0.0.1:1", TIMEOUT="2")
    assert done.returncode != 0
    assert "the gateway cannot be reached" in done.stderr


@pytest.fixture
def no_gateway() -> Iterator[str]:
    """A server that answers in the right shape, and not with pictures."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.dumps({"data": [{"b64_json": base64.b64encode(b"GIF89a").decode()}]})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_it_looks_at_what_it_gets(helm_test: HelmTest, no_gateway: str) -> None:
    done = helm_test.run(no_gateway, WORKFLOW="sd3")
    assert done.returncode != 0
    assert "that is no PNG: b'GIF89a'" in done.stderr
