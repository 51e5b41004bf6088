# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A gateway's Work stream: tasks in, events out."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest
from puppets import WAIT, Gateway, Rig, spec

from kubediffusion import tensors
from kubediffusion.node import device, ports
from kubediffusion.v1alpha1 import node_pb2


async def test_a_one_shot_task_is_accepted_and_done_with_the_outputs_asked_for(rig: Rig) -> None:
    gateway = await rig.gateway()
    await gateway.assign("r1", outputs=["embeds", "words"], inputs={"seed": 3})
    done = await gateway.event("done", "r1")
    assert gateway.kinds() == ["welcome", "accepted", "done"]
    assert set(done.outputs) == {"embeds", "words"}
    embeds = done.outputs["embeds"].tensor
    assert tensors.dtype_name(embeds.dtype) == "bfloat16"
    bits = np.frombuffer(embeds.inline, np.uint16)
    assert list(bits.astype(np.uint32) << 16) == list(np.full(4, 3.0, np.float32).view(np.uint32))
    assert tensors.value_of(done.outputs["words"]) == ["a", 1]
    assert done.timing.run_seconds > 0


async def test_a_lease_reports_its_steps_and_hands_out_checkpoints(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "TELL_SECONDS", 0.0)
    rig.strings.hold()
    gateway = await rig.gateway()
    await gateway.denoise("r1", every=2, previews=3, inputs={"steps": 4})
    for step in range(1, 5):
        rig.strings.release(1)
        if step < 4:
            progress = await gateway.event("progress", seen=step - 1)
            assert (progress.step, progress.total_steps) == (step, 4)
    done = await gateway.event("done")
    assert done.timing.steps_run == 4
    assert [c.checkpoint.step for c in gateway.all("checkpoint")] == [2]
    assert [p.step for p in gateway.all("preview")] == [3]
    assert all(
        t.HasField("inline") for t in gateway.all("checkpoint")[0].checkpoint.tensors.values()
    )
    assert gateway.all("checkpoint")[0].checkpoint.fingerprint == gateway.node.fingerprint


async def test_progress_is_told_now_and_then_and_its_end_by_the_result(rig: Rig) -> None:
    gateway = await rig.gateway()
    await gateway.denoise("r1", inputs={"steps": 50})  # all of them in far less than 100 ms
    assert (await gateway.event("done")).timing.steps_run == 50
    told = [p.step for p in gateway.all("progress")]
    assert len(told) < 25
    assert 50 not in told
    counted = rig.server.registry.get_sample_value(
        "kubediffusion_node_denoise_steps_total", {"model": "dit"}
    )
    assert counted == 50


async def test_a_cancelled_lease_stops_at_its_next_step_and_frees_what_it_holds(rig: Rig) -> None:
    rig.strings.hold()
    gateway = await rig.gateway()
    await gateway.denoise("r1", inputs={"steps": 50})
    await rig.strings.started("r1")
    await gateway.send(cancel=node_pb2.Cancel(request_id="r1"))
    await gateway.denoise("r2", inputs={"steps": 1})
    await gateway.event("accepted", "r2")
    rig.strings.release()
    assert (await gateway.event("failed", "r1")).reason == node_pb2.FAILURE_REASON_CANCELLED
    await gateway.event("done", "r2")
    assert rig.strings.ran.count("r1") == 1
    assert not rig.server.node.tasks


async def test_a_queued_task_is_cancelled_without_ever_running(rig: Rig) -> None:
    rig.strings.hold()
    gateway = await rig.gateway()
    await gateway.assign("r1", inputs={"text": "first"})
    await rig.strings.started("first")
    await gateway.assign("r2", inputs={"text": "second"})
    await gateway.send(cancel=node_pb2.Cancel(request_id="r2"))
    await gateway.assign("r3", inputs={"text": "third"})
    await gateway.event("accepted", "r3")
    rig.strings.release()
    await gateway.event("done", "r3")
    assert (await gateway.event("failed", "r2")).reason == node_pb2.FAILURE_REASON_CANCELLED
    assert rig.strings.ran == ["first", "third"]


async def test_a_yielded_lease_goes_on_elsewhere_to_the_same_bits(rig: Rig) -> None:
    gateway = await rig.gateway()
    await gateway.denoise("whole", inputs={"steps": 6})
    whole = (await gateway.event("done", "whole")).outputs["latents"].tensor.inline

    rig.strings.hold()
    await gateway.denoise("r1", inputs={"steps": 6})
    rig.strings.release(2)
    await rig.strings.started("r1", times=3)
    key = node_pb2.TaskKey(request_id="r1", task="denoise", epoch=1)
    await gateway.call.write(node_pb2.WorkRequest(**{"yield": node_pb2.Yield(key=key)}))
    await gateway.assign("after")
    await gateway.event("accepted", "after")
    rig.strings.release()
    checkpoint = (await gateway.event("yielded", "r1")).checkpoint
    assert checkpoint.step == 3

    other = await rig.gateway("g2")
    await other.denoise("r1", epoch=2, resume=checkpoint, inputs={"steps": 6, "seed": 99})
    done = await other.event("done", "r1")
    assert done.outputs["latents"].tensor.inline == whole
    assert done.timing.steps_run == 3


async def test_a_checkpoint_of_another_fingerprint_is_refused_in_exact_mode_only(rig: Rig) -> None:
    gateway = await rig.gateway()
    await gateway.denoise("r1", every=2)
    checkpoint = (await gateway.event("checkpoint", "r1")).checkpoint
    checkpoint.fingerprint = "another machine"
    await gateway.denoise("r2", resume=checkpoint)
    kind, declined = await gateway.end_of("r2")
    assert (kind, declined.reason) == ("declined", node_pb2.DECLINE_REASON_FINGERPRINT)
    await gateway.denoise("r3", resume=checkpoint, numerics=node_pb2.NUMERICS_FAST)
    assert (await gateway.end_of("r3"))[0] == "done"


async def test_an_older_epoch_is_refused_and_a_newer_one_replaces(rig: Rig) -> None:
    rig.strings.hold()
    gateway = await rig.gateway()
    await gateway.denoise("r1", epoch=2, inputs={"steps": 5})
    await rig.strings.started("r1")
    await gateway.denoise("r1", epoch=1)
    declined = await gateway.event("declined", "r1")
    assert (declined.key.epoch, declined.reason) == (1, node_pb2.DECLINE_REASON_OLD_EPOCH)
    other = await rig.gateway("g2")
    await other.denoise("r1", epoch=3, inputs={"steps": 2})
    await other.event("accepted")
    rig.strings.release()
    assert (await other.event("done", "r1")).key.epoch == 3
    assert not gateway.all("done")
    await gateway.denoise("r1", epoch=2)
    assert (await gateway.event("declined", "r1", seen=1)).key.epoch == 2


async def test_a_broken_stream_stops_its_tasks_and_keeps_its_tensors(rig: Rig) -> None:
    gateway = await rig.gateway(lease_seconds=30)
    await gateway.assign("r0", outputs=["embeds"], inputs={"size": 100_000})
    kept = (await gateway.event("done")).outputs["embeds"].tensor
    assert kept.shared_memory.path
    assert not kept.HasField("inline")
    rig.strings.hold()
    await gateway.denoise("r1", inputs={"steps": 50})
    await rig.strings.started("r1")
    await gateway.leave()
    watcher = await rig.gateway("watcher")
    rig.strings.release()
    report = await watcher.load(lambda load: not load.queued and not load.running)
    assert report.tensors == 1
    assert rig.strings.ran.count("r1") <= 2
    again = await rig.gateway()
    await again.assign("r0", "decode", inputs={"latents": ports.tensors.encode_value(kept)})
    assert (await again.event("done")).timing.fetch_seconds > 0


async def test_what_a_silent_gateway_left_is_freed_with_its_files(rig: Rig, tmp_path: Path) -> None:
    gateway = await rig.gateway(lease_seconds=10)
    await gateway.assign("r0", outputs=["embeds"], inputs={"size": 100_000})
    await gateway.event("done")
    rig.clock.time += 9
    rig.server.node.tick()
    assert rig.store.stats().tensors == 1
    rig.clock.time += 2
    rig.server.node.tick()
    assert rig.store.stats().tensors == 0
    assert (await gateway.over()).code() is grpc.StatusCode.UNAVAILABLE
    rig.store.close()
    assert not [path for path in (tmp_path / "shm").rglob("*") if path.is_file()]


async def test_a_lost_input_fails_the_task_and_names_the_tensor(rig: Rig) -> None:
    gateway = await rig.gateway()
    await gateway.assign("r0", outputs=["embeds"], inputs={"size": 100_000})
    ref = (await gateway.event("done")).outputs["embeds"].tensor
    await gateway.send(release=node_pb2.Release(request_ids=["r0"]))
    await gateway.assign("r1", inputs={"latents": ports.tensors.encode_value(ref)})
    failed = await gateway.event("failed", "r1")
    assert failed.reason == node_pb2.FAILURE_REASON_INPUT_LOST
    assert list(failed.lost_tensors) == [ref.id]
    labels = {"model": "enc", "stage": "encode", "reason": "INPUT_LOST"}
    name = "kubediffusion_node_failures_total"
    assert rig.server.registry.get_sample_value(name, labels) == 1


async def test_ten_requests_at_one_slot_are_nine_waiting_and_one_running(rig: Rig) -> None:
    rig.strings.hold()
    gateway = await rig.gateway()
    for i in range(10):
        await gateway.assign(f"r{i}", inputs={"text": f"t{i}"}, expected_seconds=2.0)
    report = await gateway.load(lambda load: load.queued == 9 and load.running == 1)
    assert report.queued_seconds == pytest.approx(20.0)

    def sample(name: str) -> float | None:
        labels = {"model": "enc", "stage": "encode"}
        return rig.server.registry.get_sample_value(f"kubediffusion_node_{name}", labels)

    assert (sample("tasks_queued"), sample("tasks_running")) == (9, 1)
    rig.strings.release()
    await gateway.event("done", "r9")
    await gateway.load(lambda load: load.queued == load.running == 0)
    assert (sample("tasks_queued"), sample("tasks_running")) == (0, 0)


async def test_a_full_queue_declines(tmp_path: Path) -> None:
    rig = await Rig(tmp_path, max_tasks=2).start()
    rig.strings.hold()
    gateway = await rig.gateway()
    for name in ("r1", "r2", "r3"):
        await gateway.assign(name)
    declined = await gateway.event("declined", "r3")
    assert declined.reason == node_pb2.DECLINE_REASON_QUEUE_FULL
    await rig.stop()


async def test_an_exact_lease_runs_alone_and_fast_ones_share_their_steps(rig: Rig) -> None:
    for numerics, batches in ((node_pb2.NUMERICS_EXACT, {1}), (node_pb2.NUMERICS_FAST, {1, 2})):
        rig.strings.hold()
        rig.strings.batches.clear()
        gateway = await rig.gateway()
        for name in ("a", "b"):
            await gateway.denoise(name, epoch=int(numerics), numerics=numerics)
        await gateway.event("accepted", "b")
        rig.strings.release()
        await gateway.event("done", "a")
        await gateway.event("done", "b")
        assert set(rig.strings.batches) == batches
        await gateway.leave()


async def test_only_declared_loras_are_used(tmp_path: Path) -> None:
    lora = node_pb2.LoraUse(name="style", uri="test://style", weight_name="w.safetensors")
    rig = await Rig(tmp_path).start([spec("enc", loras=[lora])])
    gateway = await rig.gateway()
    used = node_pb2.LoraUse(name="style", uri="test://style", weight_name="w.safetensors")
    used.scale = 0.5
    await gateway.assign("r1", loras=[used])
    await gateway.event("done", "r1")
    (given,) = rig.shelf.models["enc"].loras[0]
    assert (given.path, given.scale) == (tmp_path / "style", 0.5)
    # Of another plan than this node's, perhaps; it is not for the node to say that they are wrong.
    others = [("other", "test://style"), ("style", "file:///etc"), ("style", "test://other")]
    for name, uri in others:
        use = node_pb2.LoraUse(name=name, uri=uri, weight_name="w.safetensors")
        await gateway.assign(f"{name} {uri}", loras=[use])
        declined = await gateway.event("declined", f"{name} {uri}")
        assert declined.reason == node_pb2.DECLINE_REASON_NOT_RESIDENT
        assert f"no LoRA {name!r}" in declined.message
        assert uri not in {*rig.shelf.opened} - {"test://style"}
    await rig.stop()


async def test_a_task_keeps_the_loras_that_it_was_taken_with(tmp_path: Path) -> None:
    """The planner takes a LoRA away while a task that uses it waits for its turn."""
    lora = node_pb2.LoraUse(name="style", uri="test://style")
    rig = await Rig(tmp_path).start([spec("enc", loras=[lora])])
    gateway = await rig.gateway()
    rig.strings.hold()
    await gateway.assign("before")
    await gateway.event("accepted", "before")
    await gateway.assign("r1", loras=[lora])
    await gateway.event("accepted", "r1")
    await rig.plan(2, [spec("enc")])
    await gateway.assign("r2", loras=[lora])
    declined = await gateway.event("declined", "r2")
    assert declined.reason == node_pb2.DECLINE_REASON_NOT_RESIDENT
    rig.strings.release()
    await gateway.event("done", "r1")
    await rig.stop()


async def test_a_model_tells_how_many_tasks_use_it(tmp_path: Path) -> None:
    rig = await Rig(tmp_path).start([spec("enc"), spec("dit")])
    gateway = await rig.gateway()
    rig.strings.hold()
    for name in ("a", "b"):
        await gateway.assign(name)
        await gateway.event("accepted", name)
    used = {name: each.tasks for name, each in (await rig.statuses()).items()}
    assert used == {"enc": 2, "dit": 0}
    rig.strings.release()
    for name in ("a", "b"):
        await gateway.event("done", name)
    assert {each.tasks for each in (await rig.statuses()).values()} == {0}
    await rig.stop()


async def test_two_workflows_may_give_one_name_to_two_loras_of_a_shared_model(
    tmp_path: Path,
) -> None:
    declared = [
        node_pb2.LoraUse(name="style", uri=f"test://{folder}", weight_name="w.safetensors")
        for folder in ("ink", "oil")
    ]
    rig = await Rig(tmp_path).start([spec("enc", loras=declared)])
    gateway = await rig.gateway()
    for lora in declared:
        await gateway.assign(lora.uri, loras=[lora])
        await gateway.event("done", lora.uri)
    used = [lora.path.name for (lora,) in rig.shelf.models["enc"].loras]
    assert used == ["ink", "oil"]
    await rig.stop()


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (MemoryError("no"), node_pb2.FAILURE_REASON_OUT_OF_MEMORY),
        (RuntimeError("bug"), node_pb2.FAILURE_REASON_INTERNAL),
    ],
)
async def test_a_model_that_fails_fails_its_task_and_not_the_node(
    rig: Rig, raised: Exception, reason: int
) -> None:
    def fail(what: str) -> None:
        if what == "bad":
            raise raised

    rig.strings.fail = fail
    gateway = await rig.gateway()
    await gateway.assign("r1", inputs={"text": "bad"})
    assert (await gateway.event("failed", "r1")).reason == reason
    await gateway.assign("r2", inputs={"text": "good"})
    await gateway.event("done", "r2")
    assert not rig.server.poisoned


async def test_a_device_past_help_ends_the_node(rig: Rig) -> None:
    def fail(what: str) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rig.strings.fail = fail
    gateway = await rig.gateway()
    await gateway.assign("r1")
    await gateway.event("failed", "r1")
    await rig.server.drain_asked.wait()
    assert "illegal memory access" in rig.server.poisoned


async def test_protocols_that_do_not_overlap_are_told_apart(rig: Rig) -> None:
    gateway = Gateway(rig.channel(), "g9")
    hello = node_pb2.Hello(gateway_id="g9", protocol=node_pb2.ProtocolRange(min=7, max=9))
    await gateway.send(hello=hello)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.call.read()
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "upgrade" in (caught.value.details() or "")


async def test_a_thousand_bad_messages_leave_nothing_behind(rig: Rig, tmp_path: Path) -> None:
    gateway = await rig.gateway()
    ref = {"id": "n0/x", "shape": [4], "dtype": 1, "nbytes": 16}
    bad_refs = [
        {**ref, "inline": b"short"},
        {**ref, "nbytes": 17, "inline": bytes(16)},
        {**ref, "shape": [-4, -1], "inline": bytes(16)},
        {**ref, "dtype": 99, "inline": bytes(16)},
        {**ref, "shape": [1 << 40], "nbytes": 1 << 42},
        {**ref, "incarnation": rig.store.incarnation},
        {**ref, "address": f"unix:{tmp_path}/nobody.sock"},
    ]
    for i in range(1000):
        bad = tensors.encode_value(ports.tensor_pb2.TensorRef(**bad_refs[i % len(bad_refs)]))
        wrong = i % 10
        await gateway.assign(
            "" if wrong == 0 else f"r{i}",
            task="x" * 300 if wrong == 1 else "encode",
            model="nobody" if wrong == 2 else "dit" if wrong == 3 else "enc",
            stage="paint" if wrong == 4 else "encode",
            outputs=["nothing"] if wrong == 5 else ["embeds"],
            inputs={"size": -1} if wrong == 6 else {"size": 50_000, "latents": bad},
            loras=[node_pb2.LoraUse(name="undeclared")] if wrong == 7 else (),
        )
        if wrong == 8:
            await gateway.send()
            await gateway.send(release=node_pb2.Release(request_ids=[f"r{i}", "unknown"]))
        if wrong == 9:
            await gateway.send(cancel=node_pb2.Cancel(request_id=f"r{i}"))
    await gateway.assign("last", inputs={"text": "last"})
    await gateway.event("done", "last")
    await gateway.load(lambda load: load.queued == load.running == load.tensors == 0)
    assert {kind for kind, _ in gateway.events} <= {
        "welcome", "accepted", "declined", "failed", "done", "load",
    }  # fmt: skip
    assert len(gateway.all("failed")) + len(gateway.all("declined")) == 1000
    assert not rig.server.node.tasks
    assert not rig.shelf.models["enc"].unloaded
    assert not [p for p in (tmp_path / "shm").rglob("*") if p.is_file() and p.suffix != ".lock"]


async def test_a_bug_while_a_message_is_taken_ends_the_stream_at_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def assign(*_: object) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(rig.server.node, "assign", assign)
    gateway = await rig.gateway()
    await gateway.assign("r1")
    error = await gateway.over()
    assert error is not None
    assert error.code() is grpc.StatusCode.INTERNAL
    assert not rig.server.node.sessions


async def test_a_bug_in_the_device_thread_ends_the_node(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turn() -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(rig.server.device, "_turn", turn)
    gateway = await rig.gateway()
    await gateway.assign("r1")
    async with asyncio.timeout(WAIT):
        await rig.server.drain_asked.wait()
    assert "bug" in rig.server.poisoned
