# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The endpoints of OpenAI's images API."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import APIRouter, Depends, Request, Response

from kubediffusion.errors import InvalidInput, KubeDiffusionError
from kubediffusion.gateway.keys import ApiKeys
from kubediffusion.gateway.openai import responses
from kubediffusion.gateway.openai.body import BodyReader, off_loop
from kubediffusion.gateway.openai.errors import ErrorBody
from kubediffusion.gateway.openai.fields import EditFields, GenerationFields, ImageFields
from kubediffusion.gateway.openai.files import ImageStore
from kubediffusion.gateway.openai.flow import (
    Events,
    EventStream,
    collect,
    event_chunks,
    until_gone,
)
from kubediffusion.gateway.openai.requests import Call, Caller, build_call, find_workflow
from kubediffusion.gateway.openai.responses import Operation
from kubediffusion.v1alpha1 import gateway_pb2

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class Generates(Protocol):
    """What this face needs of a gateway."""

    def generate(self, request: gateway_pb2.GenerateRequest) -> Events:
        """Raises KubeDiffusionError; closing the iterator cancels the request."""
        ...

    def list_workflows(self) -> list[gateway_pb2.WorkflowInfo]: ...


@dataclass(frozen=True)
class StreamLimits:
    """Of server-sent events, in seconds."""

    # A comment goes out when nothing has for so long, since proxies cut silent connections.
    keepalive_seconds: float = 15.0
    # A client that takes nothing for so long has left.
    send_seconds: float = 60.0


class ImagesApi:
    """Generations, edits and models over one gateway."""

    def __init__(
        self,
        gateway: Generates,
        *,
        keys: ApiKeys | None,
        store: ImageStore,
        reader: Callable[[Request], BodyReader],
        public_url: str,
        image_urls: bool,
        limits: StreamLimits,
    ) -> None:
        self._gateway = gateway
        self._keys = keys
        self._store = store
        self._reader = reader
        self._public_url = public_url
        self._image_urls = image_urls
        self._limits = limits
        self._started = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["OpenAI"], dependencies=[Depends(self._caller)])
        failures: dict[int | str, dict[str, Any]] = {
            status: {"model": ErrorBody} for status in (400, 401, 404, 409, 413, 429, 503, 504)
        }
        image = {200: {"model": responses.ImagesAnswer, "content": {"text/event-stream": {}}}}
        router.add_api_route(
            "/images/generations",
            self.generations,
            methods=["POST"],
            responses=failures | image,
            openapi_extra=_body(GenerationFields, "application/json"),
        )
        router.add_api_route(
            "/images/edits",
            self.edits,
            methods=["POST"],
            responses=failures | image,
            openapi_extra=_body(EditFields, "multipart/form-data"),
        )
        router.add_api_route("/models", self.models, responses=failures)
        router.add_api_route("/models/{model}", self.model, responses=failures)
        return router

    async def generations(self, request: Request) -> Response:
        """Draws images from a prompt."""
        fields = await self._reader(request).generation()
        return await self._generate(request, fields, "image_generation")

    async def edits(self, request: Request) -> Response:
        """Draws images from a prompt and an image to start from."""
        fields = await self._reader(request).edit()
        return await self._generate(request, fields, "image_edit")

    async def models(self) -> responses.ModelsAnswer:
        """The workflows that are served; each is a model."""
        return responses.ModelsAnswer(data=list(map(self._model, self._gateway.list_workflows())))

    async def model(self, model: str) -> responses.ModelAnswer:
        """One workflow: its inputs with their bounds, and its LoRAs."""
        return self._model(find_workflow(self._gateway.list_workflows(), model))

    def _model(self, info: gateway_pb2.WorkflowInfo) -> responses.ModelAnswer:
        return responses.ModelAnswer(
            id=info.name,
            created=self._started,
            ready=info.ready,
            message=info.message,
            inputs=[_input(each) for each in info.inputs],
            loras=list(info.loras),
        )

    async def _caller(self, request: Request) -> None:
        """Reads the headers first, so that nobody without a key gets a body read."""
        headers = request.headers
        key = headers.get("idempotency-key", "")
        if key and not _IDEMPOTENCY_KEY.fullmatch(key):
            raise InvalidInput("must be 1 to 255 visible ASCII characters", field="Idempotency-Key")
        traceparent = headers.get("traceparent", "")
        request.state.caller = Caller(
            tenant=self._keys.tenant(headers.get("authorization", "")) if self._keys else "",
            idempotency_key=key,
            traceparent=traceparent if _TRACEPARENT.fullmatch(traceparent) else "",
        )

    async def _generate(
        self, request: Request, fields: ImageFields, operation: Operation
    ) -> Response:
        workflow = find_workflow(self._gateway.list_workflows(), fields.model)
        call = build_call(fields, workflow, request.state.caller)
        if call.output.by_url and not self._image_urls:
            raise InvalidInput(
                "an image by URL lies at the gateway that drew it, and here are several; ask for "
                '"b64_json" (or have whoever runs this set gateway.service.sessionAffinity to '
                "ClientIP, or gateway.imageUrls to true behind a proxy that keeps clients at one "
                "gateway)",
                field="response_format",
                reason="NoImageUrls",
            )
        headers = {"X-KubeDiffusion-Ignored": ", ".join(call.ignored)} if call.ignored else {}
        events = self._gateway.generate(call.request)
        try:
            if call.output.stream:
                return await self._stream(request, call, operation, events, headers)
            async with aclosing(events):
                request_id, images = await until_gone(request.receive, collect(call, events))
        except KubeDiffusionError as error:
            raise call.in_callers_words(error) from error
        request.state.gateway_request_id = request_id
        return await self._answer(request, call, images, headers)

    async def _stream(
        self,
        request: Request,
        call: Call,
        operation: Operation,
        events: Events,
        headers: Mapping[str, str],
    ) -> Response:
        try:
            # What is wrong from the start gets its own status instead of an event.
            first = await until_gone(request.receive, anext(events))
        except BaseException:
            await events.aclose()
            raise
        request.state.gateway_request_id = first.request_id
        return EventStream(
            event_chunks(call, operation, first, events),
            events,
            headers=headers,
            keepalive_seconds=self._limits.keepalive_seconds,
            send_seconds=self._limits.send_seconds,
        )

    async def _answer(
        self,
        request: Request,
        call: Call,
        images: Sequence[gateway_pb2.Image],
        headers: Mapping[str, str],
    ) -> Response:
        effort = responses.work(images, call.output)
        files = await off_loop(effort, responses.convert_all, images, call.output)
        if call.output.by_url:
            base = (self._public_url or _own_url(request)).rstrip("/")
            names = self._store.add(files, call.output.format)
            content = responses.answer(
                images, call.output, urls=[f"{base}/images/{n}" for n in names]
            )
        else:
            content = await off_loop(effort, responses.answer, images, call.output, files=files)
        return Response(content, headers=dict(headers), media_type="application/json")


def _own_url(request: Request) -> str:
    """Where the caller reached this server."""
    try:
        return str(request.base_url)
    except ValueError:
        raise InvalidInput("is not a host name", field="Host") from None


def _input(info: gateway_pb2.InputInfo) -> dict[str, Any]:
    described: dict[str, Any] = {"name": info.name, "type": info.type, "required": info.required}
    for bound in ("minimum", "maximum", "multiple_of"):
        if info.HasField(bound):
            described[bound] = getattr(info, bound)
    kind = info.default.WhichOneof("kind")
    if kind in ("text", "integer", "number", "flag"):
        described["default"] = getattr(info.default, kind)
    if info.description:
        described["description"] = info.description
    return described


def _body(fields: type[ImageFields], media_type: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{fields.__name__}"}
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}
