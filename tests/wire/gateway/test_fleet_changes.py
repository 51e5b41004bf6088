# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Nodes that are taken off the list and put on it again, as a cluster's are."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_nodes import FakeNode
from gateways import (
    assert_empty,
    changed,
    events_of,
    gateway_over,
    identities,
    images,
    one_node,
    request,
    workflow,
)
from one_image import CONFIG, STEPS, Outcome, assert_image, fleet_of, plan, up

from kubediffusion.errors import KubeDiffusionError, NotFound, Unavailable
from kubediffusion.gateway.coordinator import ImageRun
from kubediffusion.v1alpha1 import node_pb2


class Held:
    """A script that stops the denoiser in its second step."""

    def __init__(self) -> None:
        self.reached, self.go = asyncio.Event(), asyncio.Event()

    def __call__(self, node: FakeNode, assign: node_pb2.Assign, step: int) -> Any:
        if assign.stage == "denoise" and step == 2:
            self.reached.set()
            return self.go.wait()
        return None


async def test_a_node_that_goes_is_told_what_nobody_needs_any_more(tmp_path: Path) -> None:
    """It waits for that; and others could pull from it until then."""
    held = Held()
    text = FakeNode(tmp_path, "a", ("text",), by_reference=True)
    dit = FakeNode(tmp_path, "b", ("dit", "vae"), script=held)
    async with fleet_of([text, dit]) as fleet:
        outcome = Outcome()
        ImageRun(plan(), fleet, CONFIG, outcome).start()
        await asyncio.wait_for(held.reached.wait(), 60)
        gone = fleet.connections[text.address]
        fleet.set_nodes([dit.address])
        assert fleet.holds(text.address, gone.incarnation)
        held.go.set()
        await outcome.result()
        await text.until(lambda: text.released == {"r1"})
        assert_image(outcome)
        assert len([assign for assign in text.assigned if assign.stage == "encode"]) == 1


async def test_a_node_that_was_off_the_list_for_a_moment_keeps_its_work(tmp_path: Path) -> None:
    """A second stream of ours would have ended what runs there."""
    held = Held()
    node = FakeNode(tmp_path, "a", script=held)
    async with fleet_of([node]) as fleet:
        outcome = Outcome()
        ImageRun(plan(), fleet, CONFIG, outcome).start()
        await asyncio.wait_for(held.reached.wait(), 60)
        before = fleet.connections[node.address]
        fleet.set_nodes([])
        assert fleet.missing(["dit"]) == ("dit",)
        fleet.set_nodes([node.address])
        assert fleet.connections[node.address] is before
        assert fleet.missing(["dit"]) == ()
        held.go.set()
        await outcome.result()
        assert_image(outcome)
        assert node.steps["r1"] == STEPS
        assert len(node.streams) == 1


async def test_a_request_that_waits_goes_on_when_its_node_is_back_on_the_list(
    tmp_path: Path,
) -> None:
    node = FakeNode(tmp_path, "a")
    async with fleet_of([node]) as fleet:
        fleet.set_nodes([])
        outcome = Outcome()
        ImageRun(plan(), fleet, CONFIG, outcome).start()
        await asyncio.wait_for(outcome.held_event.wait(), 60)
        fleet.set_nodes([node.address])
        await outcome.result()
        assert_image(outcome)


async def test_a_node_that_has_ended_is_dialled_anew_under_its_address(tmp_path: Path) -> None:
    """Another pod may have got it."""
    node = FakeNode(tmp_path, "a")
    async with fleet_of([node]) as fleet:
        fleet.set_nodes([])
        await node.stop()
        await node.start()
        fleet.set_nodes([node.address])
        await up(fleet, 1)
        assert fleet.missing(["dit"]) == ()


async def test_what_nodes_told_of_the_next_revisions_models_is_kept(tmp_path: Path) -> None:
    """They tell it once, and a change of another workflow comes in between."""
    async with fleet_of([FakeNode(tmp_path, "a")]) as fleet:
        fleet.forget_models(frozenset({"text"}))
        assert {"dit", "vae"} <= fleet.facts.keys()
        fleet.set_nodes([])
        fleet.forget_models(frozenset({"text"}))
        assert fleet.facts.keys() == {"text"}


# ---------------------------------------------------------------- workflows that go


async def error_of(asked: asyncio.Task[Any]) -> Exception:
    with pytest.raises(KubeDiffusionError) as caught:
        await asyncio.wait_for(asked, 20)  # and not after the activation timeout of 300 s
    return caught.value


async def test_a_request_that_waits_for_a_deleted_workflow_fails_at_once(tmp_path: Path) -> None:
    """For models that were never up, and for one that was and went with its workflow."""
    sd3 = workflow()
    kinds = identities(sd3)
    dit = sd3.models["transformer"].identity
    rest = {identity: kind for identity, kind in kinds.items() if identity != dit}
    nodes = [FakeNode(tmp_path, "a", rest), FakeNode(tmp_path, "b", {dit: "dit"})]
    async with gateway_over(nodes) as gateway:
        await changed(gateway, lambda: len(gateway.fleet.facts) == len(kinds))
        await nodes[1].stop()
        await changed(gateway, lambda: bool(gateway.fleet.missing([dit])))
        asked = asyncio.create_task(events_of(gateway, request()))
        await nodes[0].until(lambda: bool(nodes[0].assigned))
        gateway.set_workflows({})
        error = await error_of(asked)
        assert isinstance(error, NotFound)
        assert "'sd3' was deleted" in str(error)
        assert_empty(gateway)
    async with gateway_over([]) as gateway:
        events = gateway.generate(request())
        assert (await anext(events)).WhichOneof("kind") == "queued"
        gateway.set_workflows({})
        with pytest.raises(NotFound):
            await asyncio.wait_for(anext(events), 20)
        assert_empty(gateway)


async def test_a_lease_that_runs_ends_though_its_workflow_is_deleted(tmp_path: Path) -> None:
    held = Held()
    node = one_node(tmp_path, script=held)
    async with gateway_over([node]) as gateway:
        asked = asyncio.create_task(events_of(gateway, request()))
        await asyncio.wait_for(held.reached.wait(), 60)
        gateway.set_workflows({})
        held.go.set()
        assert len(images(await asyncio.wait_for(asked, 60))) == 1


async def test_a_lease_that_is_given_back_with_nobody_left_to_take_it_fails_at_once(
    tmp_path: Path,
) -> None:
    held = Held()
    node = one_node(tmp_path, script=held)
    async with gateway_over([node]) as gateway:
        asked = asyncio.create_task(events_of(gateway, request()))
        await asyncio.wait_for(held.reached.wait(), 60)
        gateway.set_workflows({})
        lease = next(each for each in node.assigned if each.stage == "denoise")
        node.report(draining=True)
        node.send(yielded=node_pb2.Yielded(key=lease.key))
        assert isinstance(await error_of(asked), NotFound)
        held.go.set()


async def test_a_request_of_a_revision_that_drains_waits_and_one_of_a_gone_one_does_not(
    tmp_path: Path,
) -> None:
    sd3 = workflow()
    models = dict(sd3.models)
    old = models["transformer"]
    models["transformer"] = replace(old, identity="transformer-new")
    newer = replace(sd3, models=models)
    rest = {k: v for k, v in identities(sd3).items() if k != old.identity}
    nodes = [FakeNode(tmp_path, "a", rest), FakeNode(tmp_path, "b", {old.identity: "dit"})]
    async with gateway_over(nodes) as gateway:
        await changed(gateway, lambda: old.identity in gateway.fleet.facts)
        await nodes[1].stop()
        await changed(gateway, lambda: bool(gateway.fleet.missing([old.identity])))
        asked = asyncio.create_task(events_of(gateway, request()))
        await nodes[0].until(lambda: bool(nodes[0].assigned))
        gateway.set_workflows({"sd3": newer}, {old.identity})
        await asyncio.sleep(0)
        assert not asked.done()
        gateway.set_workflows({"sd3": newer})
        error = await error_of(asked)
        assert isinstance(error, Unavailable)
        assert error.reason == "RevisionGone"
