# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One image that loses nodes, leases and tensors on its way."""

from __future__ import annotations

import asyncio

import pytest
from fake_nodes import FakeNode, denoise_chain, digest, failed
from one_image import (
    CONFIG,
    EVERY,
    STEPS,
    Outcome,
    assert_image,
    fleet_of,
    plan,
    run_one,
    script_for,
)

from kubediffusion.errors import Internal, Unavailable
from kubediffusion.gateway.coordinator import ImageRun
from kubediffusion.v1alpha1 import node_pb2, tensor_pb2


@pytest.mark.parametrize("by_reference", [False, True])
@pytest.mark.parametrize("dies_at", [0, 1, 3, 4, 5, 8, 11, -2])
async def test_a_lost_denoiser_goes_on_elsewhere_from_its_checkpoint(
    tmp_path, dies_at, by_reference
):
    dying = script_for("denoise", dies_at, "die")
    first = FakeNode(tmp_path, "a", ("dit",), script=dying)
    second = FakeNode(tmp_path, "b", ("dit",))
    text = FakeNode(tmp_path, "c", ("text",), by_reference=by_reference)
    async with fleet_of([first, second, text, FakeNode(tmp_path, "d", ("vae",))]) as fleet:
        _, outcome = await run_one(fleet)
        assert_image(outcome)
        total = first.steps["r1"] + second.steps["r1"]
        assert total - STEPS <= EVERY
        assert [event[1] for event in outcome.of("resumed")] == ["denoise"]


async def test_a_node_of_another_fingerprint_starts_over(tmp_path):
    dying = script_for("denoise", 6, "die")
    first = FakeNode(tmp_path, "a", ("dit",), script=dying)
    second = FakeNode(tmp_path, "b", ("dit",), fingerprint="cpu-2")
    other = FakeNode(tmp_path, "c", ("text", "vae"))
    async with fleet_of([first, second, other]) as fleet:
        _, outcome = await run_one(fleet)
        assert_image(outcome)
        assert second.steps["r1"] == STEPS


async def test_outputs_that_went_with_their_node_are_made_again(tmp_path):
    """The text node dies when it is done, and the denoiser finds its input gone."""
    blocked = asyncio.Event()
    text = FakeNode(tmp_path, "a", ("text",), by_reference=True)
    spare = FakeNode(tmp_path, "b", ("text",), by_reference=True)

    def wait(node, assign, step):
        return blocked.wait() if step == -1 and not blocked.is_set() else None

    dit = FakeNode(tmp_path, "c", ("dit", "vae"), script=wait)
    async with fleet_of([text, spare, dit]) as fleet:
        outcome = Outcome()
        run = ImageRun(plan(), fleet, CONFIG, outcome)
        run.start()
        await dit.until(lambda: bool(dit.assigned))
        producer = text if text.assigned else spare
        await producer.stop()
        blocked.set()
        await outcome.result()
        assert_image(outcome)
        reasons = {event[3] for event in outcome.of("resumed")}
        assert "InputLost" in reasons
        assert len(text.assigned) + len(spare.assigned) == 2
        assert run.closed


async def test_a_yielded_lease_goes_on_elsewhere_at_that_very_step(tmp_path):
    def give_back(node, assign, step):
        if assign.stage != "denoise" or step != 6:
            return None
        state = node.checkpoint(6, STEPS, node.state_at_6)
        return node_pb2.WorkEvent(yielded=node_pb2.Yielded(key=assign.key, checkpoint=state))

    first = FakeNode(tmp_path, "a", ("dit",), script=give_back)
    embeds = digest(b"text", tensor_pb2.Value(text="a fox").SerializeToString())
    steps = tensor_pb2.Value(integer=STEPS).SerializeToString()
    first.state_at_6 = denoise_chain(digest(b"prompt.embeds", embeds, b"steps", steps), 6)
    second = FakeNode(tmp_path, "b", ("dit",))
    async with fleet_of([first, second, FakeNode(tmp_path, "c", ("text", "vae"))]) as fleet:
        _, outcome = await run_one(fleet)
        assert_image(outcome)
        assert (first.steps["r1"], second.steps["r1"]) == (6, 6)


async def test_events_of_an_older_epoch_change_nothing(tmp_path):
    """A node that lost a lease speaks up later with a wrong result."""
    late: list[node_pb2.Assign] = []

    def lose_first(node, assign, step):
        if assign.stage == "denoise" and step == 5 and not late:
            late.append(assign)
            return failed(assign, node_pb2.FAILURE_REASON_INTERNAL, "hiccup")
        if assign.stage == "denoise" and step == 8 and late:
            wrong = tensor_pb2.TensorRef(shape=[1], nbytes=1, inline=b"x")
            done = node_pb2.Done(
                key=late[0].key, outputs={"latents": tensor_pb2.Value(tensor=wrong)}
            )
            node.send(done=done)
        return None

    async with fleet_of([FakeNode(tmp_path, "a", script=lose_first)]) as fleet:
        _, outcome = await run_one(fleet)
        assert_image(outcome)


async def test_a_task_that_fails_by_itself_is_given_up_soon(tmp_path):
    broken = script_for(
        "decode",
        -1,
        lambda assign: failed(assign, node_pb2.FAILURE_REASON_INTERNAL, "nan"),
        times=99,
    )
    nodes = [FakeNode(tmp_path, name, script=broken) for name in "ab"]
    async with fleet_of(nodes) as fleet:
        _, outcome = await run_one(fleet)
        assert isinstance(outcome.end.result(), Internal)
        assert "nan" in str(outcome.end.result())
        tries = [a for node in nodes for a in node.assigned if a.stage == "decode"]
        assert len(tries) == CONFIG.retries.internal_attempts
        assert sorted(a.key.epoch for a in tries) == [1, 2, 3]


async def test_a_helper_lost_every_time_is_given_up_after_all_attempts(tmp_path):
    broken = script_for(
        "denoise",
        0,
        lambda assign: failed(assign, node_pb2.FAILURE_REASON_HELPER_LOST, "gone"),
        times=99,
    )
    node = FakeNode(tmp_path, "a", script=broken)
    async with fleet_of([node]) as fleet:
        _, outcome = await run_one(fleet)
        error = outcome.end.result()
        assert isinstance(error, Unavailable)
        assert error.reason == "TaskLost"
        tries = [a for a in node.assigned if a.stage == "denoise"]
        assert len(tries) == CONFIG.retries.attempts


async def test_the_only_node_dies_and_comes_back(tmp_path):
    node = FakeNode(tmp_path, "a", script=script_for("denoise", 7, "die"))
    async with fleet_of([node]) as fleet:
        outcome = Outcome()
        ImageRun(plan(), fleet, CONFIG, outcome).start()
        await asyncio.wait_for(outcome.held_event.wait(), 60)
        await node.start()
        await outcome.result()
        assert_image(outcome)
        assert node.steps["r1"] - STEPS <= EVERY
