# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from kubediffusion.telemetry import tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


@pytest.mark.parametrize("environ", [{}, {**ENDPOINT, "OTEL_SDK_DISABLED": "true"}])
def test_a_callers_trace_passes_through_where_nobody_asked_for_spans(
    environ: dict[str, str],
) -> None:
    traces = tracing.configure("node", environ)
    with traces.span("denoise", PARENT, steps=28) as traceparent:
        assert traceparent == PARENT
    with traces.span("denoise") as traceparent:
        assert traceparent == ""
    traces.record("denoise", PARENT, 1.5, "it failed", steps=28)
    traces.close()


def test_nothing_of_opentelemetry_is_imported_where_nobody_asked_for_spans() -> None:
    program = """
import sys
from kubediffusion.telemetry import tracing
traces = tracing.configure("node", {})
with traces.span("request"):
    traces.record("denoise", "", 1.5)
traces.close()
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_missing_exporter_is_said_and_does_not_stop_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with caplog.at_level(logging.WARNING):
        traces = tracing.configure("node", ENDPOINT)
    with traces.span("denoise", PARENT) as traceparent:
        assert traceparent == PARENT
    assert "kubediffusion[tracing]" in caplog.text


def test_spans_join_the_callers_trace_and_nest_across_messages() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    traces = tracing.OpenTelemetry("node", sdk.SimpleSpanProcessor(exporter))
    with (
        traces.span("request", PARENT) as outer,
        traces.span("denoise", outer, steps=28) as inner,
    ):
        pass
    child, parent = exporter.get_finished_spans()
    assert {outer.split("-")[1], inner.split("-")[1]} == {PARENT.split("-")[1]}
    assert f"{parent.parent.span_id:016x}" == PARENT.split("-")[2]
    assert child.parent.span_id == parent.context.span_id
    assert inner.split("-")[2] == f"{child.context.span_id:016x}"
    assert dict(child.attributes) == {"steps": 28}
    traces.close()


def test_without_a_parent_a_span_starts_a_trace_and_rubbish_is_no_parent() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    traces = tracing.OpenTelemetry("node", sdk.SimpleSpanProcessor(exporter))
    for parent in ("", "rubbish"):
        with traces.span("request", parent) as traceparent:
            assert len(traceparent) == len(PARENT)
    assert all(span.parent is None for span in exporter.get_finished_spans())


def test_what_is_over_is_recorded_with_its_length_and_its_error() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    traces = tracing.OpenTelemetry("node", sdk.SimpleSpanProcessor(exporter))
    traces.record("denoise", PARENT, 1.5, steps=28)
    traces.record("decode", "", 0.0, "no memory")
    good, bad = exporter.get_finished_spans()
    assert f"{good.parent.span_id:016x}" == PARENT.split("-")[2]
    assert good.end_time - good.start_time == 1_500_000_000
    assert dict(good.attributes) == {"steps": 28}
    assert good.status.is_unset
    assert bad.parent is None
    assert (bad.status.is_ok, bad.status.description) == (False, "no memory")
    traces.close()
