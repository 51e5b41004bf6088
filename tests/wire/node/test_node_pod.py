# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A node as a pod: its last words, its probes, its environment."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pod_nodes import NoFiles, Pod, plan
from puppets import WAIT, Clock, Gateway, Rig, spec

from kubediffusion import rpc
from kubediffusion.models.standin import STANDIN
from kubediffusion.node.config import NodeConfig
from kubediffusion.node.flags import parse
from kubediffusion.node.library import Library
from kubediffusion.node.process import EXIT_FAILED, EXIT_POISONED, run_process
from kubediffusion.node.pulse import STALL_SECONDS, Pulse
from kubediffusion.v1alpha1 import node_pb2, node_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

Start = Callable[..., Pod]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    pods: list[Pod] = []

    def _start(*models: Any, **config: Any) -> Pod:
        pods.append(Pod(tmp_path, plan(*models), **config))
        return pods[-1]

    yield _start
    for pod in pods:
        pod.process.kill()
        pod.process.join()


async def until(address: str, wanted: int, service: str = "") -> None:
    """Waits for a health status."""
    channel = rpc.connect(address)
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service=service), wait_for_ready=True
    )
    async with asyncio.timeout(WAIT):
        async for answer in watch:
            if answer.status == wanted:
                break
    await channel.close()


# ---------------------------------------------------------------- last words


def test_a_node_whose_every_model_failed_says_why_and_ends(start: Start) -> None:
    pod = start({"identity": "dit", "options": {"broken": "32 layers where 24 were expected"}})
    assert pod.exit_code() == EXIT_FAILED
    assert pod.log.read_text() == "WrongArchitecture: 32 layers where 24 were expected"


def test_each_of_several_failed_models_has_a_line(start: Start) -> None:
    pod = start(
        {"identity": "a", "options": {"broken": "no such layer"}},
        {"identity": "b", "component": "tokenizer"},
    )
    assert pod.exit_code() == EXIT_FAILED
    first, second = pod.log.read_text().splitlines()
    assert first == "WrongArchitecture: no such layer"
    assert second.startswith("UnknownComponent: ")


def test_last_words_are_cut_where_a_character_ends(start: Start) -> None:
    pod = start({"identity": "dit", "options": {"broken": "é" * 5000}})
    assert pod.exit_code() == EXIT_FAILED
    words = pod.log.read_bytes()
    assert 4094 <= len(words) <= 4096
    assert words.decode().endswith("é")


async def test_a_node_that_has_something_to_serve_goes_on(start: Start) -> None:
    pod = start(
        {"identity": "bad", "options": {"broken": "no"}},
        {"identity": "good", "component": "vae"},
    )
    await until(await asyncio.to_thread(pod.address), SERVING)
    assert pod.process.is_alive()
    assert pod.log.read_text() == ""


def test_a_node_whose_controlnets_alone_are_there_ends(start: Start) -> None:
    pod = start(
        {"identity": "dit", "options": {"broken": "no such layer"}},
        {"identity": "edges", "component": "controlnet"},
    )
    assert pod.exit_code() == EXIT_FAILED
    assert pod.log.read_text() == "WrongArchitecture: no such layer"


async def test_a_source_that_does_not_answer_is_asked_again_before_the_node_gives_up(
    start: Start,
) -> None:
    pod = start({"identity": "dit", "uri": "test://down"})
    await until(await asyncio.to_thread(pod.address), SERVING)
    assert pod.process.is_alive()


def test_a_plan_file_that_makes_no_sense_is_told(tmp_path: Path) -> None:
    (tmp_path / "residency.json").write_text('{"models": 7}')
    log = tmp_path / "termination-log"
    log.touch()
    config = NodeConfig(
        node_id="pod-1",
        address=f"unix:{tmp_path}/n.sock",
        residency=tmp_path / "residency.json",
        termination_log=log,
    )
    with pytest.raises(SystemExit) as exit_info:
        run_process(config, Library(lambda name: STANDIN, lambda *a, **k: NoFiles()))
    assert exit_info.value.code == 1
    assert log.read_text().startswith("InvalidInput: residency: ")


async def test_a_device_that_breaks_during_a_drain_ends_the_node_at_once(
    start: Start, tmp_path: Path
) -> None:
    """It would never give its leases back; the drain's ten minutes are not waited for."""
    poison = tmp_path / "poison"
    pod = start({"identity": "dit", "options": {"poison": str(poison)}}, drain_seconds=600.0)
    address = await asyncio.to_thread(pod.address)
    await until(address, SERVING)
    channel = rpc.connect(address)
    gateway = Gateway(channel, "g1")
    await gateway.open()
    await gateway.denoise("r1", inputs={"steps": 50, "prompt": "a"})
    await gateway.load(lambda load: load.running == 1)
    os.kill(pod.process.pid or 0, signal.SIGTERM)
    await gateway.load(lambda load: load.draining)
    poison.touch()
    assert await asyncio.to_thread(pod.exit_code) == EXIT_POISONED
    assert "illegal memory access" in pod.log.read_text()
    await gateway.leave()
    await channel.close()


# ---------------------------------------------------------------- what a model says of itself


async def test_a_model_with_untellable_facts_is_unloaded_and_the_next_one_loads(
    rig: Rig,
) -> None:
    class Odd(type(rig.shelf.models["enc"])):  # type: ignore[misc]
        facts = {"shape": object()}  # noqa: RUF012

    plain = rig.shelf.load

    def load(load_spec: Any) -> Any:
        model = plain(load_spec)
        if load_spec.identity == "odd":
            model.__class__ = Odd
        return model

    rig.shelf.load = load  # type: ignore[method-assign]
    await rig.plan(2, [spec("odd"), spec("next")])
    statuses = await rig.settled()
    assert statuses["odd"].state == node_pb2.MODEL_STATE_FAILED
    assert statuses["odd"].reason
    assert not statuses["odd"].stages
    assert rig.shelf.models["odd"].unloaded
    assert statuses["next"].state == node_pb2.MODEL_STATE_READY


# ---------------------------------------------------------------- probes


async def check(rig: Rig, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(rig.channel())
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_a_node_is_alive_while_it_is_not_ready(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.start(models=())
    assert await check(rig, "") == NOT_SERVING
    assert await check(rig, "liveness") == SERVING
    await rig.stop()


async def test_a_spare_node_of_a_pool_is_ready_with_an_empty_plan(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.start(models=())
    await rig.plan(1, ())
    await until(rig.server.address, SERVING)
    await rig.stop()


async def test_a_node_that_drains_is_alive(rig: Rig) -> None:
    await rig.server.drain()
    assert await check(rig, "") == NOT_SERVING
    assert await check(rig, "liveness") == SERVING


async def test_a_poisoned_node_is_not_alive(rig: Rig) -> None:
    def fail(what: str) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    rig.strings.fail = fail
    gateway = await rig.gateway()
    await gateway.assign("r1", inputs={"text": "a"})
    await until(rig.server.address, NOT_SERVING, "liveness")
    await gateway.leave()


def lease(steps: int, seconds: float = 1.0, stage: str = "denoise") -> Any:
    return SimpleNamespace(
        name=("r1", stage),
        key=SimpleNamespace(epoch=1),
        is_lease=stage == "denoise",
        steps_run=steps,
        run_seconds=steps * seconds,
    )


class Patient:
    """A device that is looked at as time passes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.pulse = Pulse(self.clock)

    def after(self, seconds: float, *running: Any, **more: Any) -> str:
        self.clock.time += seconds
        facts = {"alive": True, "poisoned": "", "busy": False, **more}
        return self.pulse.trouble(running, **facts)


def test_a_step_that_takes_a_hundred_times_as_long_as_those_before_it_never_ends() -> None:
    patient = Patient()
    assert patient.after(0, lease(5)) == ""
    assert patient.after(STALL_SECONDS - 1, lease(5)) == ""
    assert "no step of r1/denoise" in patient.after(1, lease(5))
    assert patient.after(1, lease(6)) == ""


def test_slow_steps_are_given_the_time_that_they_take() -> None:
    patient = Patient()
    patient.after(0, lease(5, seconds=60.0))
    assert patient.after(5999, lease(5, seconds=60.0)) == ""
    assert patient.after(1, lease(5, seconds=60.0))


@pytest.mark.parametrize(
    "running",
    [(), (lease(0),), (lease(0, stage="encode"),), (lease(0, stage="decode"),)],
    ids=["idle", "a first step", "an encoder", "a decoder"],
)
def test_what_nothing_was_measured_of_is_never_called_dead(running: tuple[Any, ...]) -> None:
    patient = Patient()
    patient.after(0, *running)
    assert patient.after(10**6, *running) == ""


def test_a_lease_waits_while_a_model_loads() -> None:
    patient = Patient()
    patient.after(0, lease(5))
    assert patient.after(10**6, lease(5), busy=True) == ""
    assert patient.after(STALL_SECONDS - 1, lease(5)) == ""


def test_a_thread_that_is_gone_and_a_poisoned_device_are_told_at_once() -> None:
    assert "thread" in Patient().after(0, alive=False)
    assert "illegal access" in Patient().after(0, poisoned="illegal access")


# ---------------------------------------------------------------- flags and environment


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--log-level", "LOUD"], "'LOUD' is no level; write DEBUG, INFO, WARNING, ERROR"),
        (["--drain-seconds", "nan"], "nan is not a number from 0 up"),
        (["--exit-on-failure", "perhaps"], "'perhaps' is neither true nor false"),
    ],
)
def test_a_wrong_flag_is_told_in_a_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(arguments, {})
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_wrong_variable_is_told_like_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([], {"KUBEDIFFUSION_LOG_LEVEL": "LOUD"})
    assert "argument --log-level: 'LOUD' is no level" in capsys.readouterr().err


def test_an_empty_variable_is_none_at_all() -> None:
    assert parse([], {"KUBEDIFFUSION_METRICS_PORT": ""}).metrics_port is None


async def test_a_pods_environment_starts_a_node_and_its_plan_file_outlives_it(
    tmp_path: Path,
) -> None:
    """A real model, the real program, nothing but variables; and once more after its end."""
    residency = tmp_path / "residency.json"
    request = node_pb2.SetResidencyRequest(generation=3, planner="operator")
    request.models.add(
        identity="vae-1", family="sd3", component="vae", uri="builtin://tiny-sd3", subfolder="vae"
    )
    residency.write_text(json_format.MessageToJson(request))
    socket = f"unix:{tmp_path}/n.sock"
    environ = {
        **os.environ,
        "KUBEDIFFUSION_NODE_ID": "sd3-vae-7c9f",
        "KUBEDIFFUSION_ADDRESS": socket,
        "KUBEDIFFUSION_ADVERTISE": "10.1.2.3:7070",
        "KUBEDIFFUSION_METRICS_PORT": "0",
        "KUBEDIFFUSION_METRICS_HOST": "127.0.0.1",
        "KUBEDIFFUSION_ANNOUNCE_PATH": str(tmp_path / "node.json"),
        "KUBEDIFFUSION_DRAIN_SECONDS": "5",
        "KUBEDIFFUSION_DEVICE": "cpu",
        "KUBEDIFFUSION_LOG_JSON": "true",
        "KUBEDIFFUSION_RESIDENCY": str(residency),
        "KUBEDIFFUSION_EXIT_ON_FAILURE": "true",
        "KUBEDIFFUSION_TERMINATION_LOG": str(tmp_path / "termination-log"),
        "OMP_NUM_THREADS": "1",
    }
    for _ in range(2):
        node = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kubediffusion.node", env=environ
        )
        try:
            await until(socket, SERVING)
            await until(socket, SERVING, "liveness")
            channel = rpc.connect(socket)
            stub = node_pb2_grpc.ModelNodeStub(channel)
            described = await stub.Describe(node_pb2.DescribeRequest())
            # A later plan, which only this process has heard of.
            request.generation = 9
            await stub.SetResidency(request)
            await channel.close()
            metrics = json.loads((tmp_path / "node.json").read_text())["metrics"]
            async with httpx.AsyncClient(trust_env=False) as http:
                text = (await http.get(f"http://{metrics}/metrics")).text
        finally:
            node.terminate()
            code = await asyncio.wait_for(node.wait(), WAIT)
        assert (described.node_id, described.address) == ("sd3-vae-7c9f", "10.1.2.3:7070")
        assert described.residency_generation == 3
        assert 'kubediffusion_node_model_state{model="vae-1",state="ready"} 1.0' in text
        assert code == 0
    assert not (tmp_path / "termination-log").exists()
