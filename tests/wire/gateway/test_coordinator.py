# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One image over fake nodes that talk real gRPC: in order, refused, held, taken back."""

from __future__ import annotations

import asyncio

import pytest
from fake_nodes import FakeNode, declined, failed
from one_image import (
    CONFIG,
    STEPS,
    Outcome,
    assert_image,
    fleet_of,
    plan,
    run_one,
    script_for,
    up,
)

from kubediffusion.errors import Internal, InvalidInput, Unavailable
from kubediffusion.gateway.coordinator import ImageRun
from kubediffusion.v1alpha1 import node_pb2


async def test_runs_the_stages_in_order_and_releases_the_request(tmp_path):
    async with fleet_of([FakeNode(tmp_path, "a")]) as fleet:
        run, outcome = await run_one(fleet)
        assert_image(outcome)
        assert [event[1] for event in outcome.of("started")] == ["encode", "denoise", "decode"]
        assert [event[1] for event in outcome.of("stepped")] == list(range(1, STEPS + 1))
        assert [t.task for t in run.times()] == ["prompt", "denoise", "decode"]
        assert all(t.attempts == 1 and t.node == "a" for t in run.times())


async def test_release_reaches_every_node_that_took_part(tmp_path):
    nodes = [FakeNode(tmp_path, name, (name,)) for name in ("text", "dit", "vae")]
    async with fleet_of(nodes) as fleet:
        _, outcome = await run_one(fleet)
        assert_image(outcome)
        for node in nodes:
            await node.until(lambda node=node: "r1" in node.released)


@pytest.mark.parametrize(
    "reason",
    [
        node_pb2.DECLINE_REASON_DRAINING,
        node_pb2.DECLINE_REASON_NOT_RESIDENT,
        node_pb2.DECLINE_REASON_QUEUE_FULL,
        node_pb2.DECLINE_REASON_OUT_OF_MEMORY,
        node_pb2.DECLINE_REASON_OLD_EPOCH,
        99,  # of a newer node
    ],
)
async def test_a_refused_task_goes_elsewhere(tmp_path, reason):
    refusing = script_for("denoise", -1, lambda assign: declined(assign, reason), times=99)
    nodes = [
        FakeNode(tmp_path, "a", ("dit",), script=refusing),
        FakeNode(tmp_path, "b", ("dit",)),
        FakeNode(tmp_path, "c", ("text", "vae")),
    ]
    async with fleet_of(nodes) as fleet:
        _, outcome = await run_one(fleet)
        assert_image(outcome)
        assert nodes[1].steps["r1"] == STEPS


async def test_a_task_that_nodes_with_its_model_will_not_take_fails_in_the_end(tmp_path):
    clock = [0.0]

    def refuse(assign):
        clock[0] += 100.0
        return declined(assign, node_pb2.DECLINE_REASON_NOT_RESIDENT, "no LoRA 'ink'")

    node = FakeNode(tmp_path, "a", script=script_for("denoise", -1, refuse, times=99))
    async with fleet_of([node]) as fleet:
        fleet.now = lambda: clock[0]
        _, outcome = await run_one(fleet, plan(activation_timeout=250.0))
        error = outcome.end.result()
        assert isinstance(error, Unavailable)
        assert "no LoRA 'ink'" in str(error)
        assert error.reason == "NoReplica"
        # A node that only lags behind its plan was asked again.
        assert sum(each.stage == "denoise" for each in node.assigned) == 4


async def test_a_full_node_is_asked_again_later_if_there_is_no_other(tmp_path):
    full = script_for(
        "denoise",
        -1,
        lambda assign: declined(assign, node_pb2.DECLINE_REASON_QUEUE_FULL),
        times=2,
    )
    async with fleet_of([FakeNode(tmp_path, "a", script=full)]) as fleet:
        run, outcome = await run_one(fleet)
        assert_image(outcome)
        assert [t.attempts for t in run.times()] == [1, 1, 1]  # a refusal is no attempt


async def test_words_of_a_newer_node_are_told_as_they_are(tmp_path):
    unknown = script_for("denoise", -1, lambda assign: declined(assign, 99, "too hot"), times=1)
    broken = script_for("decode", -1, lambda assign: failed(assign, 99, "too cold"), times=99)
    nodes = [
        FakeNode(tmp_path, "a", ("text", "dit"), script=unknown),
        FakeNode(tmp_path, "b", ("vae",), script=broken),
    ]
    async with fleet_of(nodes) as fleet:
        _, outcome = await run_one(fleet)
        error = outcome.end.result()
        assert isinstance(error, Internal)
        assert "too cold" in str(error)
        reasons = [event[3] for event in outcome.of("resumed")]
        assert reasons == ["Declined", *["Unspecified"] * (len(reasons) - 1)]


async def test_invalid_input_fails_the_request_and_names_the_field(tmp_path):
    bad = script_for(
        "encode",
        -1,
        lambda assign: failed(
            assign, node_pb2.FAILURE_REASON_INVALID_INPUT, "too long", field="inputs.prompt"
        ),
    )
    node = FakeNode(tmp_path, "a", script=bad)
    async with fleet_of([node]) as fleet:
        _, outcome = await run_one(fleet)
        error = outcome.end.result()
        assert isinstance(error, InvalidInput)
        assert error.field == "inputs.prompt"
        assert len(node.assigned) == 1


async def test_a_task_waits_for_a_node_and_runs_when_one_comes(tmp_path):
    late = FakeNode(tmp_path, "b", ("dit",))
    first = FakeNode(tmp_path, "a", ("text", "vae"))
    await first.start()
    async with fleet_of([first, late], start=False) as fleet:
        await up(fleet, 1)
        outcome = Outcome()
        ImageRun(plan(), fleet, CONFIG, outcome).start()
        await asyncio.wait_for(outcome.held_event.wait(), 60)
        await late.start()
        await outcome.result()
        assert_image(outcome)
        assert outcome.of("held") == [("held", "dit")]


async def test_a_model_that_becomes_resident_is_noticed(tmp_path):
    node = FakeNode(tmp_path, "a", ("text", "vae"))
    async with fleet_of([node]) as fleet:
        outcome = Outcome()
        ImageRun(plan(), fleet, CONFIG, outcome).start()
        await asyncio.wait_for(outcome.held_event.wait(), 60)
        node.models["dit"] = "dit"
        node.report()
        await outcome.result()
        assert_image(outcome)


async def test_no_node_in_time_is_an_error_that_names_the_model(tmp_path):
    async with fleet_of([FakeNode(tmp_path, "a", ("text", "vae"))]) as fleet:
        _, outcome = await run_one(fleet, plan(activation_timeout=0.05))
        error = outcome.end.result()
        assert isinstance(error, Unavailable)
        assert error.reason == "NoReplica"
        assert "dit" in str(error)


async def test_closing_cancels_and_releases_on_the_nodes(tmp_path):
    never = asyncio.Event()

    def block(node, assign, step):
        return never.wait() if step == 3 else None

    node = FakeNode(tmp_path, "a", script=block)
    async with fleet_of([node]) as fleet:
        outcome = Outcome()
        run = ImageRun(plan(), fleet, CONFIG, outcome)
        run.start()
        await node.until(lambda: node.steps["r1"] == 3 or bool(node.steps))
        run.close()
        await node.until(lambda: "r1" in node.released)
        assert node.cancelled == ["r1"]
        assert run.attempts_open == 0
        assert all(connection.assigned == 0 for connection in fleet.connections.values())
        assert not outcome.end.done()


async def test_previews_are_spread_over_the_steps(tmp_path):
    async with fleet_of([FakeNode(tmp_path, "a")]) as fleet:
        _, outcome = await run_one(fleet, plan(previews=3))
        assert [event[1] for event in outcome.of("preview")] == [3, 6, 9]


async def test_a_node_taken_off_the_list_ends_what_it_has_and_gets_nothing_new(tmp_path):
    reached, go = asyncio.Event(), asyncio.Event()

    def block(node, assign, step):
        if assign.stage == "denoise" and step == 2:
            reached.set()
            return go.wait()
        return None

    first = FakeNode(tmp_path, "a", ("dit",), script=block)
    other = FakeNode(tmp_path, "b", ("text", "vae"))
    async with fleet_of([first, other]) as fleet:
        outcome = Outcome()
        ImageRun(plan(), fleet, CONFIG, outcome).start()
        await asyncio.wait_for(reached.wait(), 60)
        fleet.set_nodes([other.address])
        go.set()
        await outcome.result()
        assert_image(outcome)
        assert first.steps["r1"] == STEPS
        assert fleet.missing(["dit"]) == ("dit",)


async def test_the_speed_of_pulled_inputs_is_learnt(tmp_path):
    """32 bytes of embeddings from the text node to the denoiser in 4 seconds: 8 a second."""
    text = FakeNode(tmp_path, "a", ("text",), by_reference=True)
    dit = FakeNode(tmp_path, "b", ("dit", "vae"))
    dit.fetch_seconds = 4.0
    async with fleet_of([text, dit]) as fleet:
        outcome = Outcome()
        ImageRun(plan(), fleet, CONFIG, outcome).start()
        await outcome.result()
        assert fleet.profiles.transfer_seconds(same_host=True, nbytes=80) == pytest.approx(10.0)
