# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Draining, and a node as a real process."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from puppets import WAIT, Gateway, Rig

from kubediffusion import node, rpc
from kubediffusion.errors import Unavailable
from kubediffusion.node.library import Library
from kubediffusion.node.process import run_process
from kubediffusion.v1alpha1 import node_pb2

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["kubediffusion.node.process", "kubediffusion.models.standin"])


class NoFiles:
    path = Path("/nonexistent")


def standins(config: node.NodeConfig) -> None:
    from kubediffusion import models

    run_process(config, Library(models.family, lambda *a, **k: NoFiles()))


async def test_a_draining_node_gives_leases_back_and_serves_tensors_until_released(
    rig: Rig,
) -> None:
    gateway = await rig.gateway()
    await gateway.assign("r0", outputs=["embeds"], inputs={"size": 100_000})
    await gateway.event("done", "r0")
    rig.strings.hold()
    await gateway.denoise("begun", inputs={"steps": 9})
    await rig.strings.started("begun")
    await gateway.denoise("waiting")
    await gateway.assign("short", inputs={"text": "short"})
    await gateway.event("accepted", "short")
    drain = asyncio.create_task(rig.server.drain())
    await gateway.load(lambda load: load.draining)
    await gateway.assign("late")
    assert (await gateway.event("declined", "late")).reason == node_pb2.DECLINE_REASON_DRAINING
    stub = health_pb2_grpc.HealthStub(rig.channel())
    status = (await stub.Check(health_pb2.HealthCheckRequest())).status
    assert status == health_pb2.HealthCheckResponse.NOT_SERVING
    rig.strings.release()
    assert (await gateway.event("yielded", "begun")).checkpoint.step == 1
    assert (await gateway.event("declined", "waiting")).reason == node_pb2.DECLINE_REASON_DRAINING
    await gateway.event("done", "short")
    await gateway.load(lambda load: load.draining and not load.queued and not load.running)
    assert not drain.done()
    await gateway.send(release=node_pb2.Release(request_ids=["r0"]))
    async with asyncio.timeout(WAIT):
        await drain


async def test_an_address_in_use_is_refused(rig: Rig, tmp_path: Path) -> None:
    other = Rig(tmp_path)
    with pytest.raises(Unavailable, match="another process does"):
        await other.server.start()
    await other.server.stop()


def announced_in(path: Path) -> dict[str, Any]:
    """What a starting process writes; blocking."""
    end = time.monotonic() + 240
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    return json.loads(path.read_text())


class Started:
    """A node process with stand-ins."""

    def __init__(self, folder: Path, **config: Any) -> None:
        plan = node_pb2.SetResidencyRequest(generation=1, planner="test")
        for component in ("text_encoder", "transformer", "vae"):
            plan.models.add(
                identity=component,
                family="standin",
                component=component,
                uri="file:///standin",
                options={"step_seconds": "0.02"},
            )
        (folder / "plan.json").write_text(json_format.MessageToJson(plan))
        self.announced = folder / "node.json"
        self.config = node.NodeConfig(
            node_id="real",
            address="127.0.0.1:0",
            threads=1,
            metrics_port=0,
            shm_dir=folder / "shm",
            announce_path=self.announced,
            residency=folder / "plan.json",
            **config,
        )
        self.process = _context.Process(target=standins, args=(self.config,))
        self.process.start()

    async def ready(self) -> grpc.aio.Channel:
        self.where = await asyncio.to_thread(announced_in, self.announced)
        channel = rpc.connect(self.where["address"])
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        async with asyncio.timeout(WAIT):
            async for answer in watch:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    watch.cancel()
                    break
        return channel

    async def exit_code(self) -> int | None:
        await asyncio.to_thread(self.process.join, WAIT)
        return self.process.exitcode


@pytest.fixture
async def started(tmp_path: Path) -> AsyncIterator[Started]:
    started = Started(tmp_path, drain_seconds=5.0)
    yield started
    started.process.kill()
    started.process.join()


async def long_lease(gateway: Gateway) -> None:
    await gateway.assign(
        "r1",
        "denoise",
        "transformer",
        "denoise",
        outputs=["latents"],
        inputs={
            "seed": 1,
            "steps": 1000,
            "prompt_1.embeds": await embeds(gateway),
        },
        lease=node_pb2.Lease(checkpoint_every=1),
    )
    await gateway.event("checkpoint", "r1")


async def embeds(gateway: Gateway) -> Any:
    await gateway.assign(
        "r1", "prompt", "text_encoder", "encode", outputs=["embeds"], inputs={"text": "a"}
    )
    return (await gateway.event("done", "r1")).outputs["embeds"]


async def test_sigterm_drains_a_real_process_and_it_exits_clean(
    started: Started, tmp_path: Path
) -> None:
    channel = await started.ready()
    assert started.where["pid"] == started.process.pid
    gateway = Gateway(channel, "g1")
    await gateway.open()
    await long_lease(gateway)
    os.kill(started.where["pid"], signal.SIGTERM)
    yielded = await gateway.event("yielded", "r1")
    assert 0 < yielded.checkpoint.step < 1000
    assert await started.exit_code() == 0
    await gateway.over()
    await channel.close()
    assert not [path for path in (tmp_path / "shm").rglob("*") if path.is_file()]


async def test_a_killed_process_breaks_the_stream_at_once(started: Started) -> None:
    channel = await started.ready()
    gateway = Gateway(channel, "g1")
    await gateway.open()
    await long_lease(gateway)
    os.kill(started.where["pid"], signal.SIGKILL)
    error = await gateway.over()
    assert error is not None
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    await channel.close()


def orphan(config: node.NodeConfig, announced: Any) -> None:
    """Starts a node and dies without a word."""
    child = multiprocessing.get_context("fork").Process(target=standins, args=(config,))
    child.start()
    announced.wait(WAIT)
    os._exit(1)


async def test_a_node_goes_when_the_process_that_started_it_is_gone(tmp_path: Path) -> None:
    config = node.NodeConfig(
        node_id="real",
        address=f"unix:{tmp_path}/n.sock",
        threads=1,
        announce_path=tmp_path / "node.json",
        exit_with_parent=True,
    )
    announced = _context.Event()
    parent = _context.Process(target=orphan, args=(config, announced))
    parent.start()
    child = os.pidfd_open(announced_in(tmp_path / "node.json")["pid"])
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(child, gone.set)
    announced.set()
    async with asyncio.timeout(WAIT):
        await gone.wait()
    asyncio.get_running_loop().remove_reader(child)
    os.close(child)
    parent.join()
