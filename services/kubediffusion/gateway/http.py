# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The gateway's HTTP face: OpenAI's images API, images by URL, and health.

docs/openai.md lists what of OpenAI's is honoured, ignored and refused.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kubediffusion.errors import Internal, KubeDiffusionError, NotFound, Unavailable
from kubediffusion.gateway.keys import ApiKeys
from kubediffusion.gateway.openai.body import BodyReader, ByteBudget
from kubediffusion.gateway.openai.errors import Refused, error_response
from kubediffusion.gateway.openai.fields import EditFields, GenerationFields
from kubediffusion.gateway.openai.files import ImageStore
from kubediffusion.gateway.openai.routes import Generates, ImagesApi, StreamLimits
from kubediffusion.gateway.readiness import Readiness
from kubediffusion.telemetry.logging import context
from kubediffusion.telemetry.metrics import GatewayMetrics
from kubediffusion.telemetry.tracing import PassThrough, Tracing

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True)
class HttpLimits:
    """What clients can make this face hold; bytes and seconds."""

    # Of one body, and of the bodies of all requests that are not answered yet.
    body_bytes: int = 64 << 20
    bodies_bytes: int = 512 << 20
    body_seconds: float = 60.0
    # Images for answers by URL.
    store_bytes: int = 256 << 20
    store_seconds: float = 3600.0
    stream: StreamLimits = field(default_factory=StreamLimits)


def build_app(
    gateway: Generates,
    *,
    api_keys: frozenset[str] | None = None,
    public_url: str = "",
    image_urls: bool = True,
    readiness: Readiness | None = None,
    limits: HttpLimits | None = None,
    metrics: GatewayMetrics | None = None,
    tracing: Tracing | None = None,
    now: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The ASGI application over `gateway`.

    With `api_keys`, callers must bring one. `public_url` is where clients reach this application,
    for answers by URL; without it the address of each request is taken. Without `image_urls` such
    answers are refused: they lie in this process, and clients come to others too. Without a
    `readiness` of its owner's it is ready as soon as there is a workflow.
    """
    limits = limits or HttpLimits()
    budget = ByteBudget(limits.bodies_bytes)
    store = ImageStore(capacity=limits.store_bytes, ttl=limits.store_seconds, now=now)

    def reader(request: Request) -> BodyReader:
        request.state.body = BodyReader(
            request, budget, limit=limits.body_bytes, seconds=limits.body_seconds
        )
        return request.state.body

    app = FastAPI(
        title="KubeDiffusion",
        summary="Images from prompts, by OpenAI's images API",
        redirect_slashes=False,
    )
    app.state.store = store
    app.state.budget = budget
    api = ImagesApi(
        gateway,
        keys=None if api_keys is None else ApiKeys(api_keys),
        store=store,
        reader=reader,
        public_url=public_url,
        image_urls=image_urls,
        limits=limits.stream,
    )
    app.include_router(api.router())
    _add_health(app, gateway, readiness)
    _add_images(app, store)
    _add_failures(app)
    app.add_middleware(
        _PerRequest,
        metrics=metrics,
        tracing=tracing or PassThrough(),
        readiness=readiness or Readiness(),
        now=now,
    )
    app.openapi = lambda: _openapi(app)
    return app


def _add_health(app: FastAPI, gateway: Generates, readiness: Readiness | None) -> None:
    @app.get("/healthz", tags=["Health"])
    async def healthz() -> dict[str, str]:
        """The event loop turns."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["Health"])
    async def readyz() -> dict[str, Any]:
        """Requests can be sent. A workflow without running models is no obstacle: requests for it
        are held until they run, so it must not keep the gateway out of its Service."""
        if readiness is not None and readiness.why:
            raise Unavailable(readiness.why, reason="NotReady")
        workflows = gateway.list_workflows()
        if not workflows and readiness is None:
            raise Unavailable("no workflow is served yet", reason="NoWorkflows")
        return {"status": "ok", "workflows": {info.name: info.ready for info in workflows}}


def _add_images(app: FastAPI, store: ImageStore) -> None:
    @app.get("/images/{name}", tags=["Images"], response_class=Response)
    async def image(name: str) -> Response:
        """An image that an answer named; its name is the permission to read it."""
        found = store.get(name)
        if found is None:
            raise NotFound(
                "there is no such image, or its time is over; images by URL are kept for a while "
                "only",
                reason="ImageNotFound",
            )
        stored, seconds = found
        headers = {
            "Cache-Control": f"private, immutable, max-age={int(seconds)}",
            "X-Content-Type-Options": "nosniff",
        }
        return Response(stored.data, headers=headers, media_type=stored.media_type)


def _add_failures(app: FastAPI) -> None:
    @app.exception_handler(KubeDiffusionError)
    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, KubeDiffusionError)
        if isinstance(error, Internal):
            log.error("%s failed: %s", request.scope["path"], error, exc_info=error)
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = str(request.scope["path"])[:200]
        if error.status_code == 404:
            return error_response(NotFound(f"unknown URL: {path}", reason="UnknownUrl"))
        refused = Refused(
            f"{request.method} {path}: {error.detail}", status=error.status_code, reason="Refused"
        )
        response = error_response(refused)
        response.headers.update(error.headers or {})
        return response


class _PerRequest:
    """Gives each request its id and its span, counts it, gives back what its body took, and
    answers for our bugs."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: GatewayMetrics | None,
        tracing: Tracing,
        readiness: Readiness,
        now: Callable[[], float],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing
        self._readiness = readiness
        self._now = now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        own = not _REQUEST_ID.fullmatch(given)
        request_id = f"req-{uuid.uuid4().hex}" if own else given
        begin, code = self._now(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                # The gateway's own id, where it is known and the caller has none.
                known = own and getattr(request.state, "gateway_request_id", "")
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = known or request_id
                if self._readiness.why:
                    # The next request of this client finds another gateway by a new connection.
                    headers["Connection"] = "close"
            await send(message)

        with context(http_request=request_id), self._span(scope):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:
                # Callers are told where to look, and nothing of the inside.
                log.exception("%s %r failed", scope["method"], scope["path"])
                if code:
                    raise
                error = Internal(
                    f"the server failed at this request; its log says why, under {request_id}"
                )
                await error_response(error)(scope, receive, send_with_id)
            finally:
                body: BodyReader | None = getattr(request.state, "body", None)
                if body is not None:
                    body.close()
                self._observe(scope, code, self._now() - begin)

    @contextmanager
    def _span(self, scope: Scope) -> Iterator[None]:
        """Requests to the nodes lie under the request's own span, and that under its caller's."""
        headers = MutableHeaders(scope=scope)
        # Not by its path: the name of an image is the permission to read it.
        name, above = f"HTTP {scope['method']}", headers.get("traceparent", "")
        with self._tracing.span(name, above) as traceparent:
            if traceparent:
                headers["traceparent"] = traceparent
            yield

    def _observe(self, scope: Scope, code: int, seconds: float) -> None:
        if self._metrics is None:
            return
        # The template, never what a caller made up. 499: the caller left before its answer.
        route = getattr(scope.get("route"), "path", "unknown")
        self._metrics.http_requests.labels(route, str(code or 499)).inc()
        self._metrics.http_request_seconds.labels(route).observe(seconds)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's, with the bodies that this application reads by itself."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes
        )
        _, bodies = models_json_schema(
            [(GenerationFields, "validation"), (EditFields, "validation")],
            ref_template="#/components/schemas/{model}",
        )
        schema["components"]["schemas"] |= bodies["$defs"]
        app.openapi_schema = schema
    return app.openapi_schema
