# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Nodes that are taken off the list and put on it again, as a cluster's are."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fake_nodes import FakeNode, Held
from one_image import CONFIG, STEPS, Outcome, assert_image, fleet_of, plan, up

from kubediffusion.gateway.coordinator import ImageRun


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
