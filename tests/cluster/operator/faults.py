# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""An HTTPS proxy before the real API server that does what API servers do on bad days."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from tests.cluster.kube import ControlPlane
from tests.cluster.pki import certificate

_PASSED_ON = ("Authorization", "Content-Type", "Accept", "User-Agent")


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    watch: bool

    @property
    def write(self) -> bool:
        return self.method not in ("GET", "HEAD")


@dataclass(frozen=True)
class Refuse:
    """An error in place of the answer; the API server never sees the call."""

    status: int
    reason: str = ""
    retry_after: float | None = None


@dataclass(frozen=True)
class Lose:
    """The API server does what was asked, and the answer is lost on the way."""


@dataclass(frozen=True)
class Expire:
    """A watch that begins with an ERROR event: 410 Gone, or another code."""

    code: int = 410


Fault = Refuse | Lose | Expire
Rule = Callable[[Call], Fault | None]


class FaultProxy:
    """`rule` is asked about every call. A context manager; runs in a thread of its own."""

    def __init__(self, plane: ControlPlane, rule: Rule = lambda call: None) -> None:
        self.rule = rule
        self.injected: list[tuple[Call, Fault]] = []
        self.calls: list[Call] = []
        self._plane = plane
        self._streams: set[asyncio.Transport] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.url = ""

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def drop_watches(self) -> int:
        """Cuts the connection of every watch; how many there were."""

        async def cut() -> int:
            streams = list(self._streams)
            for transport in streams:
                transport.abort()
            return len(streams)

        return asyncio.run_coroutine_threadsafe(cut(), self._loop).result(30)

    async def _start(self) -> None:
        certificate(
            self._plane.pki, "proxy", "/CN=proxy", "serverAuth", "DNS:localhost,IP:127.0.0.1"
        )
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server.load_cert_chain(self._plane.pki / "proxy.crt", self._plane.pki / "proxy.key")
        client = ssl.create_default_context(cafile=str(self._plane.pki / "ca.crt"))
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=client, limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            read_bufsize=2**20,
        )
        application = web.Application(client_max_size=2**24)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=server)
        await site.start()
        self.url = f"https://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        for transport in list(self._streams):
            transport.abort()
        await self._session.close()
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        call = Call(request.method, request.path, request.query.get("watch") == "true")
        self.calls.append(call)
        fault = self.rule(call)
        if fault is not None:
            self.injected.append((call, fault))
        if isinstance(fault, Refuse):
            return _refusal(fault)
        if isinstance(fault, Expire):
            return web.Response(text=json.dumps(_expired(fault.code)) + "\n")
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        try:
            async with self._session.request(
                request.method,
                self._plane.url + request.raw_path,
                headers=headers,
                data=await request.read() or None,
            ) as answer:
                if isinstance(fault, Lose):
                    await answer.read()
                    return self._cut(request)
                return await self._pass_on(request, call, answer)
        except aiohttp.ClientError:  # the API server is down, or was stopped just now
            return self._cut(request)

    async def _pass_on(
        self, request: web.Request, call: Call, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status)
        response.content_type = answer.content_type
        if "Retry-After" in answer.headers:
            response.headers["Retry-After"] = answer.headers["Retry-After"]
        transport = request.transport
        if call.watch and isinstance(transport, asyncio.Transport):
            self._streams.add(transport)
        try:
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
        except (ConnectionError, aiohttp.ClientError):
            return self._cut(request)
        finally:
            self._streams.discard(transport)  # pyright: ignore[reportArgumentType]
        return response

    @staticmethod
    def _cut(request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()  # pyright: ignore[reportAttributeAccessIssue]
        return web.Response(status=502)


def _refusal(fault: Refuse) -> web.Response:
    headers = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
    status = {
        "apiVersion": "v1",
        "kind": "Status",
        "status": "Failure",
        "code": fault.status,
        "reason": fault.reason or "Injected",
        "message": "injected by the test",
    }
    return web.json_response(status, status=fault.status, headers=headers)


def _expired(code: int) -> dict[str, object]:
    status = {
        "apiVersion": "v1",
        "kind": "Status",
        "status": "Failure",
        "code": code,
        "reason": "Expired" if code == 410 else "InternalError",
        "message": "injected by the test",
    }
    return {"type": "ERROR", "object": status}
