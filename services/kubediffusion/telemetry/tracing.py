# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Traces across processes, by OpenTelemetry where it is installed and asked for.

Every message that starts work carries a W3C ``traceparent``. Without OpenTelemetry it is handed on
as it came, so a trace of the caller's stays whole around us; with the ``tracing`` extra installed
and an ``OTEL_EXPORTER_OTLP_ENDPOINT`` set, our own spans are in it. The environment variables are
OpenTelemetry's own.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

log = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Tracing(Protocol):
    def span(
        self, name: str, traceparent: str = "", **attributes: str | int | float | bool
    ) -> AbstractContextManager[str]:
        """A span under `traceparent`; the value is what the messages sent inside carry."""
        ...

    def record(
        self,
        name: str,
        traceparent: str,
        seconds: float,
        error: str = "",
        **attributes: str | int | float | bool,
    ) -> None:
        """A span under `traceparent` that ends now and took so long; `error`: it failed."""
        ...

    def close(self) -> None:
        """Sends what is left."""
        ...


class PassThrough:
    """No spans of our own."""

    @contextmanager
    def span(
        self, name: str, traceparent: str = "", **attributes: str | int | float | bool
    ) -> Iterator[str]:
        yield traceparent

    def record(
        self,
        name: str,
        traceparent: str,
        seconds: float,
        error: str = "",
        **attributes: str | int | float | bool,
    ) -> None:
        pass

    def close(self) -> None:
        pass


class OpenTelemetry:
    """Spans with a provider of this process' own, not OpenTelemetry's global one."""

    def __init__(self, service: str, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": service, "service.namespace": "kubediffusion"})
        self._provider: TracerProvider = TracerProvider(resource=resource)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("kubediffusion")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def span(
        self, name: str, traceparent: str = "", **attributes: str | int | float | bool
    ) -> Iterator[str]:
        from opentelemetry.trace import set_span_in_context

        parent = self._propagator.extract({"traceparent": traceparent})
        with self._tracer.start_as_current_span(name, parent, attributes=attributes) as span:
            carrier: dict[str, str] = {}
            self._propagator.inject(carrier, set_span_in_context(span))
            yield carrier["traceparent"]

    def record(
        self,
        name: str,
        traceparent: str,
        seconds: float,
        error: str = "",
        **attributes: str | int | float | bool,
    ) -> None:
        from opentelemetry.trace import StatusCode

        end = time.time_ns()
        parent = self._propagator.extract({"traceparent": traceparent})
        begin = end - round(seconds * 1e9)
        span = self._tracer.start_span(name, parent, attributes=attributes, start_time=begin)
        if error:
            span.set_status(StatusCode.ERROR, error)
        span.end(end)

    def close(self) -> None:
        self._provider.shutdown()


def configure(service: str, environ: Mapping[str, str] = os.environ) -> Tracing:
    """Tracing as the OTEL_* environment asks for it."""
    disabled = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if disabled or not any(environ.get(name) for name in _ENDPOINTS):
        return PassThrough()
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning(
            "an OTEL_EXPORTER_OTLP endpoint is set and %s is missing: no spans are sent; "
            "install kubediffusion[tracing]",
            error.name,
        )
        return PassThrough()
    name = environ.get("OTEL_SERVICE_NAME") or service
    return OpenTelemetry(name, BatchSpanProcessor(OTLPSpanExporter()))
