# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a planner asks for, and what comes of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from puppets import Rig, spec

from kubediffusion.node.residency import MAX_FETCHES
from kubediffusion.v1alpha1 import node_pb2

READY, FAILED = node_pb2.MODEL_STATE_READY, node_pb2.MODEL_STATE_FAILED
DOWNLOADING = node_pb2.MODEL_STATE_DOWNLOADING


async def health(rig: Rig) -> int:
    stub = health_pb2_grpc.HealthStub(rig.channel())
    return (await stub.Check(health_pb2.HealthCheckRequest())).status


async def test_planned_models_load_and_tell_their_facts(rig: Rig) -> None:
    status = (await rig.statuses())["enc"]
    assert status.state == READY
    assert status.nbytes == 1000
    assert status.facts["patch_size"].integer == 2
    assert status.facts["exact"].flag is True
    assert list(status.stages) == ["encode", "decode"]
    assert (status.downloaded_bytes, status.total_bytes) == (10, 10)


async def test_the_node_serves_once_its_plan_is_carried_out(tmp_path: Path) -> None:
    rig = await Rig(tmp_path).start(models=())
    assert await health(rig) == health_pb2.HealthCheckResponse.NOT_SERVING
    await rig.plan(1, [spec("enc")])
    await rig.settled()
    assert await health(rig) == health_pb2.HealthCheckResponse.SERVING
    await rig.stop()


async def test_an_older_plan_is_refused_and_an_equal_one_changes_nothing(rig: Rig) -> None:
    await rig.plan(5, [spec("enc")])
    await rig.settled()
    for generation, models in ((4, [spec("enc")]), (5, [spec("vae")])):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.plan(generation, models)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    await rig.plan(5, [spec("enc")])
    assert set(await rig.settled()) == {"enc"}


async def test_an_unplanned_model_goes_after_giving_its_lease_back(rig: Rig) -> None:
    rig.strings.hold()
    gateway = await rig.gateway()
    await gateway.denoise("begun", inputs={"steps": 9})
    await rig.strings.started("begun")
    await gateway.denoise("waiting", inputs={"steps": 9})
    await gateway.event("accepted", "waiting")
    await rig.plan(2, [spec("enc"), spec("new")])
    rig.strings.release()
    assert (await gateway.event("yielded", "begun")).checkpoint.step == 1
    declined = await gateway.event("declined", "waiting")
    assert declined.reason == node_pb2.DECLINE_REASON_NOT_RESIDENT
    assert set(await rig.settled()) == {"enc", "new"}
    assert rig.shelf.models["dit"].unloaded
    await gateway.denoise("late")
    declined = await gateway.event("declined", "late")
    assert declined.reason == node_pb2.DECLINE_REASON_NOT_RESIDENT


async def test_a_plan_over_the_memory_limit_fails_the_model_that_does_not_fit(
    tmp_path: Path,
) -> None:
    rig = await Rig(tmp_path, memory_limit=2500).start(
        [spec("a"), spec("big", options={"nbytes": "2000"}), spec("b")]
    )
    statuses = await rig.settled()
    assert {name: status.state for name, status in statuses.items()} == {
        "a": READY,
        "big": FAILED,
        "b": READY,
    }
    assert statuses["big"].reason == "OutOfMemory"
    assert "2500" in statuses["big"].message
    assert statuses["big"].nbytes == 2000
    assert rig.shelf.models["big"].unloaded
    await rig.plan(2, [spec("big", options={"nbytes": "2000"})])
    assert (await rig.settled())["big"].state == READY
    await rig.stop()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (spec("x", options={"broken": "another architecture"}), "WrongArchitecture"),
        (spec("x", options={"exhausting": "1"}), "OutOfMemory"),
        (node_pb2.ModelSpec(identity="x", family="nobody", component="vae"), "UnknownFamily"),
        (spec("x", "tokenizer"), "UnknownComponent"),
        (spec("x", subfolder="torn"), "BadWeights"),
        (spec("x", subfolder="../elsewhere"), "InvalidInput"),
    ],
)
async def test_a_model_that_cannot_load_says_why_and_the_others_serve(
    tmp_path: Path, model: node_pb2.ModelSpec, reason: str
) -> None:
    torn = tmp_path / "w" / "torn"
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_bytes((10**6).to_bytes(8, "little") + b"{}")
    rig = await Rig(tmp_path).start([model, spec("enc")])
    statuses = await rig.settled()
    assert (statuses["x"].state, statuses["x"].reason) == (FAILED, reason)
    assert statuses["x"].message
    assert statuses["enc"].state == READY
    assert await health(rig) == health_pb2.HealthCheckResponse.SERVING
    await rig.stop()


async def test_a_source_that_is_down_is_asked_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.shelf.down = 1
    await rig.start(models=())
    await rig.plan(1, [spec("enc")])
    residency = rig.server.residency
    await rig.until(lambda: residency.statuses()[0].reason == "SourceUnavailable")
    assert residency.statuses()[0].state == node_pb2.MODEL_STATE_PENDING
    rig.clock.time += 2
    await rig.plan(2, [spec("enc")])
    assert (await rig.settled())["enc"].state == READY
    await rig.stop()


def states(rig: Rig) -> dict[str, int]:
    return {status.identity: status.state for status in rig.server.residency.statuses()}


@pytest.fixture
def slow(rig: Rig) -> Iterator[str]:
    """A source that does not answer before the test is over."""
    answer = rig.shelf.slow["test://slow"] = threading.Event()
    yield "test://slow"
    answer.set()


async def test_a_slow_source_holds_up_no_other_model(rig: Rig, slow: str) -> None:
    await rig.plan(2, [spec("slow", uri=slow), spec("new")])
    await rig.until(lambda: rig.server.residency.ready == ["new"])
    assert states(rig)["slow"] == DOWNLOADING


async def test_a_model_no_longer_planned_is_not_waited_for(rig: Rig, slow: str) -> None:
    await rig.plan(2, [spec("slow", uri=slow)])
    await rig.until(lambda: states(rig)["slow"] == DOWNLOADING)
    await rig.plan(3, [spec("new")])
    assert set(await rig.settled()) == {"new"}
    assert "slow" not in rig.shelf.models


async def test_only_so_many_sources_are_read_at_a_time(rig: Rig, slow: str) -> None:
    names = [f"slow-{number}" for number in range(MAX_FETCHES + 2)]
    await rig.plan(2, [spec(name, uri=slow) for name in names])
    await rig.until(lambda: DOWNLOADING in states(rig).values())
    assert list(states(rig).values()).count(DOWNLOADING) == MAX_FETCHES
    rig.shelf.slow[slow].set()
    assert set(await rig.settled()) == set(names)


async def test_equal_weight_files_have_equal_digests(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    for name, data in (("a", bytes(8)), ("b", bytes(8)), ("c", bytes(7) + b"x")):
        folder = tmp_path / "w" / name
        folder.mkdir(parents=True)
        file = len(header).to_bytes(8, "little") + header + data
        (folder / "model.safetensors").write_bytes(file)
    rig = await Rig(tmp_path).start([spec(name, subfolder=name) for name in "abc"])
    digests = {name: status.digest for name, status in (await rig.settled()).items()}
    assert digests["a"] == digests["b"] != digests["c"]
    assert digests["a"].startswith("sha256:")
    await rig.stop()


async def test_a_controlnet_that_comes_to_a_node_keeps_nobody_waiting(tmp_path: Path) -> None:
    rig = await Rig(tmp_path).start([spec("dit", "transformer")])
    rig.shelf.down = 1
    await rig.plan(2, [spec("dit", "transformer"), spec("edges", "controlnet")])
    residency = rig.server.residency
    await rig.until(lambda: any(s.reason == "SourceUnavailable" for s in residency.statuses()))
    assert not residency.settled
    assert await health(rig) == health_pb2.HealthCheckResponse.SERVING
    rig.clock.time += 2
    await rig.plan(3, [spec("dit", "transformer"), spec("edges", "controlnet")])
    assert (await rig.settled())["edges"].state == READY
    assert await health(rig) == health_pb2.HealthCheckResponse.SERVING
    await rig.stop()


async def test_a_new_node_is_ready_when_its_controlnets_are(tmp_path: Path) -> None:
    rig = await Rig(tmp_path).start(models=())
    rig.shelf.down = 1
    await rig.plan(1, [spec("edges", "controlnet"), spec("dit", "transformer")])
    residency = rig.server.residency
    await rig.until(lambda: "dit" in residency.ready)
    assert await health(rig) == health_pb2.HealthCheckResponse.NOT_SERVING
    await rig.stop()


async def test_a_controlnet_alone_serves_nobody(tmp_path: Path) -> None:
    dit = spec("dit", "transformer", options={"broken": "another architecture"})
    rig = await Rig(tmp_path).start([spec("edges", "controlnet"), dit])
    statuses = await rig.settled()
    assert (statuses["edges"].state, statuses["dit"].state) == (READY, FAILED)
    assert await health(rig) == health_pb2.HealthCheckResponse.NOT_SERVING
    assert rig.server.residency.hopeless == "WrongArchitecture: another architecture"
    await rig.stop()


async def test_reflection_lists_the_services(rig: Rig) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(rig.channel())
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    call.cancel()
    names = {service.name for service in answer.list_services_response.service}
    assert names >= {"kubediffusion.v1alpha1.ModelNode", "grpc.health.v1.Health"}


async def test_a_model_that_cannot_be_unloaded_does_not_keep_the_next_plan_from_being_carried_out(
    rig: Rig,
) -> None:
    def unload() -> None:
        raise RuntimeError("bug")

    rig.shelf.models["enc"].unload = unload  # type: ignore[method-assign]
    await rig.plan(2, [spec("enc2")])
    statuses = await rig.settled()
    assert {name: status.state for name, status in statuses.items()} == {
        "enc2": node_pb2.MODEL_STATE_READY
    }
