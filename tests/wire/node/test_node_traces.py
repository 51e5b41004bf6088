# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""With OpenTelemetry asked for, a node makes a span of every task that ended on it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from puppets import WAIT, Rig

from kubediffusion.node import ports, report
from kubediffusion.telemetry import tracing
from kubediffusion.v1alpha1 import node_pb2

TRACE, PARENT = "1" * 32, "2" * 16
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Traces:
    """OpenTelemetry that keeps its spans, and says when it was closed."""

    def __init__(self) -> None:
        export = pytest.importorskip("opentelemetry.sdk.trace.export")
        memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
        self.exporter = memory.InMemorySpanExporter()
        self.services: list[str] = []
        self.closed = threading.Event()
        self._inner = tracing.OpenTelemetry("node", export.SimpleSpanProcessor(self.exporter))

    def configure(self, service: str) -> Traces:
        self.services.append(service)
        return self

    def record(self, *args: Any, **attributes: Any) -> None:
        self._inner.record(*args, **attributes)

    def close(self) -> None:
        self._inner.close()
        self.closed.set()

    def spans(self) -> dict[str, Any]:
        """By request."""
        return {s.attributes["request_id"]: s for s in self.exporter.get_finished_spans()}


async def test_each_task_is_a_span_under_its_gateways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = Traces()
    monkeypatch.setattr(report, "configure_tracing", traces.configure)
    rig = await Rig(tmp_path, shm_dir=tmp_path / "shm").start()
    assert traces.services == ["kubediffusion-node"]
    gateway = await rig.gateway()
    big = {"size": 100_000}
    await gateway.assign("text", outputs=["embeds"], inputs=big, traceparent=TRACEPARENT)
    ref = (await gateway.event("done", "text")).outputs["embeds"].tensor
    latents = {"latents": ports.tensors.encode_value(ref)}
    await gateway.assign("next", "decode", inputs=latents, traceparent=TRACEPARENT)
    done = await gateway.event("done", "next")
    await gateway.denoise("lease", inputs={"steps": 3}, traceparent=TRACEPARENT)
    await gateway.event("done", "lease")
    await gateway.send(release=node_pb2.Release(request_ids=["text"]))
    await gateway.assign("lost", inputs=latents, traceparent=TRACEPARENT)
    lost = await gateway.event("failed", "lost")
    await gateway.assign("rootless")
    await gateway.event("done", "rootless")

    spans = traces.spans()
    assert set(spans) == {"text", "next", "lease", "lost", "rootless"}
    assert spans.pop("rootless").parent is None
    for span in spans.values():
        assert f"{span.context.trace_id:032x}" == TRACE
        assert f"{span.parent.span_id:016x}" == PARENT
    attributes = spans["next"].attributes
    timing = done.timing
    assert attributes["fetch_seconds"] == timing.fetch_seconds > 0
    assert attributes["queue_seconds"] == timing.queue_seconds
    assert attributes["run_seconds"] == timing.run_seconds
    assert (attributes["model"], attributes["outcome"]) == ("enc", "done")
    assert (spans["lease"].name, spans["lease"].attributes["steps"]) == ("denoise", 3)
    assert spans["lost"].attributes["outcome"] == "failed"
    assert spans["lost"].status.description == lost.message
    assert "run_seconds" not in spans["lost"].attributes

    await rig.stop()
    assert traces.closed.wait(WAIT)
