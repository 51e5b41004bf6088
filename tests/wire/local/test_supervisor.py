# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The supervisor with real node processes, whose models weigh nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry
from standin_nodes import (
    plans,
    serve_crash,
    serve_crash_once,
    serve_standins,
)

from kubediffusion import rpc
from kubediffusion.errors import Unavailable, UnsupportedModel
from kubediffusion.local import supervisor as supervisor_room
from kubediffusion.local.folders import RunFolder
from kubediffusion.local.process import NodeProcess
from kubediffusion.local.restart import RestartPolicy
from kubediffusion.local.supervisor import NodePhase, NodeReport, Supervisor
from kubediffusion.telemetry.metrics import SupervisorMetrics
from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc

WAIT = 240.0  # the fork server imports torch on a machine that may be busy
QUICK = RestartPolicy(healthy=0.0, first=0.01, most=0.05, crash_loop=3)


class Watch:
    """The supervisor's reports, to be waited for."""

    def __init__(self) -> None:
        self.reports: list[NodeReport] = []
        self._changed = asyncio.Event()

    def __call__(self, report: NodeReport) -> None:
        self.reports.append(report)
        self._changed.set()

    async def until(self, what: Callable[[NodeReport], bool]) -> NodeReport:
        async with asyncio.timeout(WAIT):
            while True:
                for report in self.reports:
                    if what(report):
                        return report
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def supervised(
    base: Path, *roles: str, serve: Any = serve_standins, **options: Any
) -> AsyncIterator[tuple[Supervisor, Watch]]:
    folder, watch = RunFolder(base), Watch()
    supervisor = Supervisor(
        plans(*roles), folder, policy=QUICK, on_change=watch, serve=serve, **options
    )
    supervisor.start()
    try:
        yield supervisor, watch
    finally:
        await supervisor.stop()
        folder.close()


async def in_time(what: Awaitable[Any]) -> Any:
    async with asyncio.timeout(WAIT):
        return await what


async def describe(address: str) -> node_pb2.DescribeResponse:
    channel = rpc.connect(address)
    try:
        stub: Any = node_pb2_grpc.ModelNodeStub(channel)
        return await stub.Describe(node_pb2.DescribeRequest(), wait_for_ready=True, timeout=WAIT)
    finally:
        await channel.close()


pytestmark = pytest.mark.usefixtures("fork_server")


async def test_every_node_gets_its_models_and_listens_where_it_was_told(run_base: Path) -> None:
    async with supervised(run_base, "text_encoder", "vae") as (supervisor, _):
        await in_time(supervisor.wait_ready())
        assert [r.phase for r in supervisor.reports()] == [NodePhase.READY] * 2
        described = [await describe(address) for address in supervisor.addresses]
        assert [node.models[0].identity for node in described] == [
            "text-encoder-0123456789",
            "vae-0123456789",
        ]
        pids = [report.pid for report in supervisor.reports()]
    for pid in pids:
        assert not _alive(pid)
    assert os.listdir(run_base) == []


async def test_a_killed_node_comes_back_with_its_plan_and_its_address(run_base: Path) -> None:
    metrics = SupervisorMetrics(CollectorRegistry())
    async with supervised(run_base, "transformer", metrics=metrics) as (supervisor, watch):
        await in_time(supervisor.wait_ready())
        before = await describe(supervisor.addresses[0])
        os.kill(supervisor.reports()[0].pid, signal.SIGKILL)
        died = await watch.until(lambda r: r.phase is NodePhase.RESTARTING)
        assert "was killed by SIGKILL" in died.message
        await watch.until(lambda r: r.phase is NodePhase.READY and r.restarts == 1)
        after = await describe(supervisor.addresses[0])
        assert after.incarnation != before.incarnation
        assert [m.state for m in after.models] == [node_pb2.MODEL_STATE_READY]
        assert after.residency_generation > before.residency_generation
        assert metrics.restarts.labels("killed")._value.get() == 1
        assert metrics.nodes._value.get() == 1


async def test_a_node_that_crashes_once_at_its_start_is_no_trouble(run_base: Path) -> None:
    async with supervised(run_base, "vae", serve=serve_crash_once) as (supervisor, _):
        await in_time(supervisor.wait_ready())
        assert supervisor.reports()[0].restarts == 1


async def test_a_node_that_cannot_be_started_again_is_tried_until_it_can(
    run_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, starts = NodeProcess.start, 0

    async def fail_once(*args: Any) -> NodeProcess:
        nonlocal starts
        starts += 1
        if starts == 2:
            raise Unavailable("no process can be had", reason="NodeStart")
        return await start(*args)

    monkeypatch.setattr(NodeProcess, "start", fail_once)
    async with supervised(run_base, "vae") as (supervisor, watch):
        await in_time(supervisor.wait_ready())
        os.kill(supervisor.reports()[0].pid, signal.SIGKILL)
        failed = await watch.until(lambda r: r.phase is NodePhase.FAILED)
        assert "no process can be had" in failed.message
        await watch.until(lambda r: r.phase is NodePhase.READY and r.restarts == 1)


async def test_a_node_too_busy_to_answer_gets_its_models_later(
    run_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry_out, calls = supervisor_room._Keeper._carry_out, 0

    async def late(keeper: Any, stub: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            no_more = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, no_more, no_more)
        return await carry_out(keeper, stub)

    monkeypatch.setattr(supervisor_room._Keeper, "_carry_out", late)
    async with supervised(run_base, "vae") as (supervisor, _):
        await in_time(supervisor.wait_ready())
        assert supervisor.reports()[0].restarts == 0


async def test_a_crash_loop_is_told_with_its_exit_code_and_its_last_words(
    run_base: Path,
) -> None:
    async with supervised(run_base, "vae", serve=serve_crash) as (supervisor, _):
        with pytest.raises(Unavailable) as caught:
            await in_time(supervisor.wait_ready())
    assert caught.value.reason == "NodeCrashLoop"
    assert "node vae ended with code 3, 3 times in a row" in caught.value.message
    assert "the matrix is singular" in caught.value.message


async def test_a_model_that_cannot_be_loaded_is_named_by_its_role(run_base: Path) -> None:
    async with supervised(run_base, "wrong") as (supervisor, _):
        with pytest.raises(UnsupportedModel) as caught:
            await in_time(supervisor.wait_ready())
    assert caught.value.reason == "WrongArchitecture"
    assert caught.value.field == "models.wrong"
    assert "kettle" in caught.value.message


async def test_stopping_while_nodes_still_start_leaves_nothing(run_base: Path) -> None:
    async with supervised(run_base, "vae", "transformer") as (supervisor, watch):
        await watch.until(lambda r: r.pid > 0)
        pids = [report.pid for report in supervisor.reports() if report.pid]
    assert not any(_alive(pid) for pid in pids)
    assert os.listdir(run_base) == []


async def test_a_drain_lets_nodes_end_by_themselves(run_base: Path) -> None:
    async with supervised(run_base, "vae") as (supervisor, watch):
        await in_time(supervisor.wait_ready())
        pid = supervisor.reports()[0].pid
        await in_time(supervisor.stop(drain_seconds=30))
        assert not _alive(pid)
        assert watch.reports[-1].phase is NodePhase.STOPPED
        assert not any(report.restarts for report in watch.reports)


async def test_prometheus_is_told_where_the_nodes_serve_metrics(run_base: Path) -> None:
    async with supervised(run_base, "vae", serve_metrics=True) as (supervisor, _):
        await in_time(supervisor.wait_ready())
        port = supervisor.reports()[0].metrics
        assert port
        targets = (supervisor.folder.path / "prometheus.json").read_text()
        assert f"127.0.0.1:{port}" in targets


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
