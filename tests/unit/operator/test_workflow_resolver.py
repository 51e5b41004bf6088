# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from kubediffusion.api import DiffusionWorkflow
from kubediffusion.errors import SourceUnavailable, UnsupportedModel
from kubediffusion.resolving import Findings
from kubediffusion.sources import Index
from kubediffusion.telemetry.metrics import OperatorMetrics
from kubediffusion_operator import resolver as module
from kubediffusion_operator.planning.types import Resolution, ResolutionError
from kubediffusion_operator.resolver import Resolver

FINDINGS = Findings(Index({"vae": "AutoencoderKL"}, "c0ffee"), {("hf://a/b", "main"): "1234"})


def workflow(uid: str = "u", generation: int = 1) -> dict[str, Any]:
    pipeline = {"preset": "StableDiffusion3", "source": {"uri": "builtin://tiny-sd3"}}
    return {
        "apiVersion": "kubediffusion.io/v1alpha1",
        "kind": "DiffusionWorkflow",
        "metadata": {"name": "sd3", "uid": uid, "generation": generation, "namespace": "ns"},
        "spec": {"pipeline": pipeline},
    }


class Sources:
    """Answers look-ups with the next of `answers`; the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[Findings | Exception] = [FINDINGS]
        self.asked = 0
        self.results: asyncio.Queue[str] = asyncio.Queue()
        self.gate: threading.Event | None = None
        self.resolver = Resolver(
            self.results.put_nowait, OperatorMetrics(CollectorRegistry()), self._look
        )

    def _look(self, definition: DiffusionWorkflow) -> Findings:
        self.asked += 1
        if self.gate is not None:
            assert self.gate.wait(30)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def result(self) -> Resolution | ResolutionError:
        assert await self.results.get() == "ns"
        return self.resolver.results("ns")["u", 1]


@pytest.fixture
async def found() -> AsyncIterator[Sources]:
    found = Sources()
    yield found
    if found.gate is not None:
        found.gate.set()
    await found.resolver.stop()


async def test_a_workflow_is_looked_up_once_for_each_generation(found: Sources) -> None:
    for _ in range(3):
        found.resolver.want("ns", workflow())
    result = await found.result()
    assert isinstance(result, Resolution)
    assert dict(result.index.components) == {"vae": "AutoencoderKL"}
    assert result.index.commit == "c0ffee"
    assert result.commits == {("hf://a/b", "main"): "1234"}
    found.resolver.want("ns", workflow())
    assert found.asked == 1
    found.resolver.want("ns", workflow(generation=2))
    await found.results.get()
    assert found.asked == 2
    assert found.resolver.results("elsewhere") == {}


async def test_a_source_that_does_not_answer_is_due_again_and_answers(
    found: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_FIRST", 0.01)
    found.answers = [SourceUnavailable("away", field="spec.pipeline.source"), FINDINGS]
    found.resolver.want("ns", workflow())
    assert await found.result() == ResolutionError(
        "SourceUnavailable", "away", "spec.pipeline.source"
    )
    due = await found.result()
    assert isinstance(due, ResolutionError)
    assert due.due
    found.resolver.want("ns", workflow())
    assert isinstance(await found.result(), Resolution)


async def test_until_it_is_due_an_error_stays(found: Sources) -> None:
    found.answers = [UnsupportedModel("no pipeline", reason="WrongArchitecture")]
    found.resolver.want("ns", workflow())
    result = await found.result()
    assert isinstance(result, ResolutionError)
    assert (result.reason, result.due) == ("WrongArchitecture", False)
    found.resolver.want("ns", workflow())
    assert found.asked == 1


async def test_our_bug_is_an_error_of_that_workflow_only(found: Sources) -> None:
    found.answers = [ZeroDivisionError("oops")]
    found.resolver.want("ns", workflow())
    result = await found.result()
    assert isinstance(result, ResolutionError)
    assert result.reason == "Internal"
    assert "oops" in result.message


def test_lasting_answers_are_asked_for_rarely_and_passing_ones_with_growing_pauses() -> None:
    passing = SourceUnavailable("away")
    assert [module._pause(passing, n) for n in (1, 2, 3, 20)] == [5, 10, 20, 300]
    for reason in ("SourceNotFound", "RevisionNotFound", "Unauthorized"):
        assert module._pause(SourceUnavailable("no", reason=reason), 1) == module.RETRY_LASTING
    assert module._pause(UnsupportedModel("no"), 1) == module.RETRY_LASTING


async def test_a_workflow_that_is_gone_is_forgotten_even_while_it_is_looked_up(
    found: Sources,
) -> None:
    found.gate = threading.Event()
    found.resolver.want("ns", workflow())
    found.resolver.want("other", workflow("v"))
    found.resolver.keep_only("ns", {})
    found.gate.set()
    assert await found.results.get() == "other"
    assert found.resolver.results("ns") == {}
    assert list(found.resolver.results("other")) == [("v", 1)]


async def test_a_slow_source_does_not_hold_the_loop_up(found: Sources) -> None:
    found.gate = threading.Event()
    found.resolver.want("ns", workflow())
    for _ in range(10):
        await asyncio.sleep(0)
    assert found.results.empty()
    found.gate.set()
    assert isinstance(await found.result(), Resolution)
