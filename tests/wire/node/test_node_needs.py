# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Gateways say which models their requests will still come for; a node that goes stays for them."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from puppets import MODELS, WAIT, Gateway, Rig

from kubediffusion.node import server
from kubediffusion.node.tasks import Task
from kubediffusion.v1alpha1 import node_pb2

_serial = itertools.count()


async def need(gateway: Gateway, *models: str) -> None:
    """Returns when the node knows."""
    await gateway.send(renew=node_pb2.Renew(needed_models=models))
    after = f"after-{next(_serial)}"
    await gateway.assign(after, model="nowhere")
    await gateway.event("declined", after)


async def needed(rig: Rig) -> dict[str, int]:
    """By how many gateways, of the models that any needs."""
    return {i: status.needed_by for i, status in (await rig.statuses()).items() if status.needed_by}


async def test_a_model_is_needed_until_its_gateways_say_otherwise_or_vanish(rig: Rig) -> None:
    one, two = await rig.gateway("g1"), await rig.gateway("g2")
    await need(one, "dit", "vae", "of-another-node")
    await need(two, "dit")
    assert await needed(rig) == {"dit": 2, "vae": 1}
    await need(one, "vae")  # each time all of them
    assert await needed(rig) == {"dit": 1, "vae": 1}
    await need(one)  # all that an older gateway ever says
    assert await needed(rig) == {"dit": 1}
    # A stream that breaks may come back; a gateway that does not is forgotten with its lease.
    await two.leave()
    rig.clock.time += 29
    rig.server.node.tick()
    assert await needed(rig) == {"dit": 1}
    rig.clock.time += 2
    rig.server.node.tick()
    assert await needed(rig) == {}


async def test_a_planner_hears_of_it_in_the_answer_to_its_plan(rig: Rig) -> None:
    gateway = await rig.gateway()
    await need(gateway, "dit")
    answer = await rig.plan(1, MODELS)
    assert {status.identity: status.needed_by for status in answer.models} == {
        "enc": 0,
        "dit": 1,
        "vae": 0,
    }


# ---------------------------------------------------------------- a node that drains


async def test_a_draining_node_takes_tasks_of_models_that_their_gateway_needs(rig: Rig) -> None:
    """Nobody else has them; and the same lease goes on where it was."""
    gateway, other = await rig.gateway("g1"), await rig.gateway("g2")
    rig.strings.hold()
    await gateway.denoise("r1", inputs={"steps": 3})
    await rig.strings.started("r1")
    await gateway.denoise("waiting")
    await gateway.event("accepted", "waiting")
    await need(gateway, "dit")
    drain = asyncio.create_task(rig.server.drain())
    await gateway.load(lambda load: load.draining)
    rig.strings.release(1)
    # As ever, so that a node that can has them.
    checkpoint = (await gateway.event("yielded", "r1")).checkpoint
    assert checkpoint.step == 1
    await gateway.event("declined", "waiting")
    await gateway.denoise("r1", epoch=2, resume=checkpoint, inputs={"steps": 3})
    await gateway.assign("r2", model="enc")
    await other.denoise("r3")
    for asked, request in ((gateway, "r2"), (other, "r3")):
        refused = await asked.event("declined", request)
        assert refused.reason == node_pb2.DECLINE_REASON_DRAINING
    rig.strings.release()
    assert (await gateway.event("done", "r1")).timing.steps_run == 2
    assert rig.strings.ran == ["r1"] * 3
    await gateway.load(lambda load: not load.queued and not load.running)
    assert not drain.done()
    await need(gateway)
    async with asyncio.timeout(WAIT):
        await drain


async def test_a_draining_node_with_nothing_to_do_stays_while_it_is_needed(rig: Rig) -> None:
    gateway = await rig.gateway()
    await need(gateway, "vae", "of-another-node")
    drain = asyncio.create_task(rig.server.drain())
    await gateway.load(lambda load: load.draining)
    await gateway.assign("r1", model="vae", stage="decode")
    await gateway.event("done", "r1")
    assert not drain.done()
    # What it does not have concerns others.
    await need(gateway, "of-another-node")
    async with asyncio.timeout(WAIT):
        await drain


async def test_a_gateway_may_hear_later_than_the_node_that_all_goes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEAR_SECONDS", 5.0)
    gateway = await rig.gateway()
    drain = asyncio.create_task(rig.server.drain())
    await gateway.load(lambda load: load.draining)
    await need(gateway, "vae")
    await gateway.assign("r1", model="vae", stage="decode")
    await gateway.event("done", "r1")
    assert not drain.done()
    await need(gateway)
    async with asyncio.timeout(WAIT):
        await drain


async def test_a_node_without_gateways_waits_for_nobody(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEAR_SECONDS", WAIT * 2)
    async with asyncio.timeout(WAIT):
        await rig.server.drain()


async def test_a_gateway_that_vanishes_holds_no_node(rig: Rig) -> None:
    gateway = await rig.gateway()
    await need(gateway, "vae")
    drain = asyncio.create_task(rig.server.drain())
    await gateway.load(lambda load: load.draining)
    await gateway.leave()
    assert not drain.done()
    rig.clock.time += 31
    rig.server.node.tick()
    async with asyncio.timeout(WAIT):
        await drain


# ---------------------------------------------------------------- a node that is to evict


async def test_an_eviction_waits_for_those_who_need_the_model(rig: Rig) -> None:
    gateway = await rig.gateway()
    await need(gateway, "dit")
    rig.strings.hold()
    await gateway.denoise("r1", inputs={"steps": 2})
    await rig.strings.started("r1")
    await rig.plan(2, [each for each in MODELS if each.identity == "vae"])
    rig.strings.release()
    await gateway.event("done", "r1")
    await rig.until(lambda: len(rig.server.residency.statuses()) == 2)  # the encoder went
    assert (await rig.statuses())["dit"].state == node_pb2.MODEL_STATE_READY
    await gateway.denoise("r2", inputs={"steps": 1})
    await gateway.event("done", "r2")
    await need(gateway)
    assert set(await rig.settled()) == {"vae"}


async def test_a_needed_model_that_is_planned_again_never_went(rig: Rig) -> None:
    gateway = await rig.gateway()
    await need(gateway, "dit")
    model = rig.shelf.models["dit"]
    await rig.plan(2, [each for each in MODELS if each.identity != "dit"])
    await rig.plan(3, MODELS)
    await need(gateway)
    await rig.plan(4, MODELS)
    await rig.settled()
    assert rig.shelf.models["dit"] is model
    assert not model.unloaded


@pytest.mark.parametrize("how", ["drain", "evict"])
async def test_what_waits_does_not_begin_in_the_room_that_others_leave(rig: Rig, how: str) -> None:
    """All are stopped at once, however long the loop takes to tell the device of each."""
    gateway = await rig.gateway()
    rig.strings.hold()
    await gateway.denoise("r1")
    await rig.strings.started("r1")
    await gateway.denoise("waiting")
    await gateway.event("accepted", "waiting")
    device, tell = rig.server.node._device, rig.server.node._device.stop

    def tell_slowly(task: Task) -> None:
        tell(task)
        rig.strings.release()
        with rig.strings.changed:  # the device's turn, should it take one
            rig.strings.changed.wait_for(lambda: "waiting" in rig.strings.ran, 0.2)

    device.stop = tell_slowly  # type: ignore[method-assign]
    if how == "drain":
        drain = asyncio.create_task(rig.server.drain())
    else:
        await rig.plan(2, [model for model in MODELS if model.identity != "dit"])
    await gateway.event("declined", "waiting")
    assert "waiting" not in rig.strings.ran
    if how == "drain":
        async with asyncio.timeout(WAIT):
            await drain
