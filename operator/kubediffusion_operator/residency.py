# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Tells running nodes what to host, and keeps what they answered."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

import grpc
import grpc.aio
from google.protobuf import json_format

from kubediffusion import rpc
from kubediffusion.telemetry.metrics import OperatorMetrics
from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc
from kubediffusion_operator.planning.residency import loras_in
from kubediffusion_operator.planning.types import (
    ModelReport,
    ModelState,
    ResidencyReport,
    ResidencyWrite,
)

CALL_SECONDS = 5.0
AT_ONCE = 16
# A pod that does not answer is asked again after 1, 2, 4, ... seconds.
PAUSE_FIRST = 1.0
PAUSE_MOST = 30.0
# A pod whose models are still coming is asked at most so often.
POLL_SECONDS = 1.0

log = logging.getLogger(__name__)


@dataclass
class _Pod:
    namespace: str
    wanted: ResidencyWrite
    report: ResidencyReport | None = None
    task: asyncio.Task[None] | None = None
    alarm: asyncio.TimerHandle | None = None
    failures: int = 0
    not_before: float = 0.0
    sent: ResidencyWrite | None = None


class Residency:
    """One call at a time for each pod. `on_report` gets the namespace of a report that is new."""

    def __init__(
        self,
        on_report: Callable[[str], None],
        metrics: OperatorMetrics,
        *,
        now: Callable[[], float],
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._on_report = on_report
        self._metrics = metrics
        self._now = now
        self._wall = wall
        self._jitter = jitter
        self._pods: dict[str, _Pod] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)

    def reports(self, namespace: str) -> Mapping[str, ResidencyReport]:
        """By the pod's uid."""
        return {
            uid: pod.report
            for uid, pod in self._pods.items()
            if pod.namespace == namespace and pod.report is not None
        }

    def send(self, namespace: str, writes: Sequence[ResidencyWrite]) -> None:
        """Begins to send; a pod that has just been asked the same is asked when it is time."""
        for write in writes:
            pod = self._pods.setdefault(write.uid, _Pod(namespace, write))
            pod.wanted = write
            if pod.task is not None:
                continue  # `_sent` looks at what is wanted by then
            if pod.sent != write:
                pod.not_before = 0.0
            wait = pod.not_before - self._now()
            if wait <= 0:
                self._start(pod)
            elif pod.alarm is None:
                loop = asyncio.get_running_loop()
                pod.alarm = loop.call_later(wait, self._on_report, namespace)

    def keep_only(self, namespace: str, uids: Iterable[str]) -> None:
        """Forgets pods that are gone."""
        wanted = set(uids)
        for uid, pod in list(self._pods.items()):
            if pod.namespace == namespace and uid not in wanted:
                del self._pods[uid]
                self._cancel(pod)

    async def stop(self) -> None:
        tasks = [pod.task for pod in self._pods.values() if pod.task is not None]
        for pod in self._pods.values():
            self._cancel(pod)
        await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    def _cancel(pod: _Pod) -> None:
        if pod.alarm is not None:
            pod.alarm.cancel()
        if pod.task is not None:
            pod.task.cancel()

    def _start(self, pod: _Pod) -> None:
        if pod.alarm is not None:
            pod.alarm.cancel()
            pod.alarm = None
        pod.sent = pod.wanted
        pod.task = asyncio.create_task(self._send(pod), name=f"residency {pod.wanted.pod}")

    async def _send(self, pod: _Pod) -> None:
        write = pod.wanted
        try:
            async with self._slots:
                report = await self._call(write, pod.report)
        except Exception as error:  # a bug of ours must not end the asking
            log.exception("pod %s: its answer cannot be read", write.pod)
            text = f"its answer cannot be read: {type(error).__name__}: {error}"
            report = ResidencyReport(write.restarts, 0, error=text)
        finally:
            pod.task = None
        if report.error:
            pod.failures += 1
            pause = min(PAUSE_FIRST * 2 ** min(pod.failures - 1, 16), PAUSE_MOST)
            pause *= 0.5 + 0.5 * self._jitter()
        else:
            pod.failures = 0
            pause = POLL_SECONDS
        self._metrics.residency_calls.labels("error" if report.error else "ok").inc()
        pod.not_before = self._now() + pause
        known, pod.report = pod.report, report
        if pod.wanted != write:
            pod.failures = 0
            self._start(pod)
        elif known != report:
            self._on_report(pod.namespace)

    async def _call(self, write: ResidencyWrite, known: ResidencyReport | None) -> ResidencyReport:
        try:
            request = json_format.ParseDict(dict(write.content), node_pb2.SetResidencyRequest())
        except json_format.ParseError as error:
            return ResidencyReport(write.restarts, 0, error=f"no plan for a node: {error}")
        asked = self._wall().replace(microsecond=0).isoformat().replace("+00:00", "Z")
        channel = rpc.connect(write.address)
        stub = node_pb2_grpc.ModelNodeStub(channel)
        try:
            answer = await stub.SetResidency(request, timeout=CALL_SECONDS)
            if known is not None and known.memory_limit:
                return _report(write, answer, known.memory_limit, asked)
            node = await stub.Describe(node_pb2.DescribeRequest(), timeout=CALL_SECONDS)
            return _report(write, answer, node.memory_limit, asked)
        except grpc.aio.AioRpcError as error:
            text = error.details() or error.code().name
            log.debug("pod %s: SetResidency: %s", write.pod, text)
            generation = await _generation_of(stub) if _refused(error) else 0
            return ResidencyReport(write.restarts, generation, error=text)
        finally:
            await channel.close()


def _refused(error: grpc.aio.AioRpcError) -> bool:
    """The node has a newer plan."""
    return error.code() is grpc.StatusCode.FAILED_PRECONDITION


async def _generation_of(stub: node_pb2_grpc.ModelNodeStub) -> int:
    try:
        node = await stub.Describe(node_pb2.DescribeRequest(), timeout=CALL_SECONDS)
    except grpc.aio.AioRpcError:
        return 0
    return node.residency_generation


def _report(
    write: ResidencyWrite,
    answer: node_pb2.SetResidencyResponse,
    memory_limit: int,
    asked: str,
) -> ResidencyReport:
    loras = {str(spec["identity"]): loras_in(spec) for spec in write.content["models"]}
    return ResidencyReport(
        restarts=write.restarts,
        answered=asked,
        generation=answer.generation,
        memory_limit=memory_limit,
        models=tuple(
            ModelReport(
                identity=model.identity,
                state=_state(model.state),
                reason=model.reason,
                message=model.message,
                nbytes=model.nbytes,
                digest=model.digest,
                tasks=model.tasks if model.HasField("tasks") else None,
                needed=model.needed_by > 0,
                loras=loras.get(model.identity, frozenset()),
            )
            for model in answer.models
        ),
    )


def _state(state: int) -> ModelState:
    """UNSPECIFIED for one that only a newer node knows."""
    return cast(ModelState, rpc.word_of(node_pb2.ModelState, state, "MODEL_STATE_"))
