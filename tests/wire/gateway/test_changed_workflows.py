# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Workflows that are changed or deleted while requests of them are under way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_nodes import FakeNode, Held, declined
from gateways import (
    CONFIG,
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

from kubediffusion.errors import KubeDiffusionError, NotFound, Unavailable
from kubediffusion.gateway.config import NodeLimits
from kubediffusion.gateway.core import Gateway
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2
from kubediffusion.workflow import ResolvedWorkflow


async def error_of(asked: asyncio.Task[Any]) -> KubeDiffusionError:
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


# ---------------------------------------------------------------- what requests still need


ENCODING = ("encode", -2)
DRAINING = node_pb2.DECLINE_REASON_DRAINING


def with_another(role: str, resolved: ResolvedWorkflow) -> ResolvedWorkflow:
    other = replace(resolved.models[role], identity=f"{role}-new")
    return replace(resolved, models={**resolved.models, role: other})


async def begun(gateway: Gateway, held: Held, **fields: Any) -> asyncio.Task[Any]:
    """A request that `held` has stopped."""
    asked = asyncio.create_task(events_of(gateway, request(**fields)))
    await asyncio.wait_for(held.reached.wait(), 60)
    return asked


async def undisturbed(path: Path, **fields: Any) -> list[gateway_pb2.Image]:
    async with gateway_over([one_node(path, "undisturbed")]) as gateway:
        return images(await events_of(gateway, request(**fields)))


def pixels(found: Sequence[gateway_pb2.Image]) -> list[bytes]:
    return [image.png for image in found]


async def test_nodes_hear_what_a_request_of_the_revision_before_still_needs(tmp_path: Path) -> None:
    """At its text encoder, when no transformer knows of it; and that it has ended."""
    held = Held(*ENCODING)
    sd3 = workflow()
    kinds = identities(sd3)
    dit = sd3.models["transformer"].identity
    rest = {identity: kind for identity, kind in kinds.items() if identity != dit}
    nodes = [FakeNode(tmp_path, "a", rest, script=held), FakeNode(tmp_path, "b", {dit: "dit"})]
    late = one_node(tmp_path, "late")
    async with gateway_over(nodes) as gateway:
        await changed(gateway, lambda: dit in gateway.fleet.facts)
        asked = await begun(gateway, held)
        gateway.set_workflows({"sd3": workflow()})  # another workflow changed, say
        gateway.set_workflows({"sd3": with_another("transformer", sd3)}, {dit})
        for node in nodes:
            await node.until(lambda node=node: bool(node.needed))
            assert node.needed == [set(kinds)]
        # One that comes, or comes back, is told too.
        await late.start()
        gateway.set_nodes([*(node.address for node in nodes), late.address])
        await late.until(lambda: late.needed == [set(kinds)])
        held.go.set()
        assert len(images(await asked)) == 1
        for node in (*nodes, late):
            await node.until(lambda node=node: node.needed == [set(kinds), set()])
    await late.stop()


async def test_only_what_was_asked_for_is_needed(tmp_path: Path) -> None:
    """Two requests of different revisions, one of which goes back."""
    held = Held(*ENCODING)
    node = one_node(tmp_path, script=held)
    sd3 = workflow()
    async with gateway_over([node]) as gateway:
        asked = await begun(gateway, held)
        gateway.set_workflows({"sd3": with_another("vae", sd3)})
        await node.until(lambda: len(node.needed) == 1)
        gateway.set_workflows({"sd3": workflow()})
        await node.until(lambda: node.needed[1:] == [set()])
        gateway.set_workflows({})
        await node.until(lambda: len(node.needed) == 3)
        asked.cancel()
        await node.until(lambda: node.needed[3:] == [set()])


# ---------------------------------------------------------------- nodes that go with their workflow


async def test_a_request_that_has_begun_ends_on_nodes_that_are_going(tmp_path: Path) -> None:
    """The node gives the lease back, as ever, and gets it again because nobody else has it."""
    expected = pixels(await undisturbed(tmp_path))
    held = Held()
    node = one_node(tmp_path, script=held)
    async with gateway_over([node]) as gateway:
        asked = await begun(gateway, held)
        gateway.set_workflows({})
        lease = next(each for each in node.assigned if each.stage == "denoise")
        node.report(draining=True)
        node.send(yielded=node_pb2.Yielded(key=lease.key))
        held.stage = ""
        assert pixels(images(await asyncio.wait_for(asked, 60))) == expected
        assert node.needed[0] == set(node.models)
        assert_empty(gateway)


async def test_a_gateway_that_hears_late_finds_the_nodes_still_there(tmp_path: Path) -> None:
    """The lease came back first, and waits for another node; then there is to be none."""
    expected = pixels(await undisturbed(tmp_path))
    held = Held()
    node = one_node(tmp_path, script=held)
    async with gateway_over([node]) as gateway:
        waits = asyncio.Event()

        async def draw() -> list[gateway_pb2.GenerateEvent]:
            found: list[gateway_pb2.GenerateEvent] = []
            async for event in gateway.generate(request()):
                found.append(event)
                if event.queued.cold:
                    waits.set()
            return found

        asked = asyncio.create_task(draw())
        await asyncio.wait_for(held.reached.wait(), 60)
        lease = next(each for each in node.assigned if each.stage == "denoise")
        waits.clear()  # it did so before it knew of the node
        held.stage = ""
        node.report(draining=True)
        node.send(yielded=node_pb2.Yielded(key=lease.key))
        await asyncio.wait_for(waits.wait(), 60)
        gateway.set_workflows({})
        assert pixels(images(await asyncio.wait_for(asked, 60))) == expected


async def test_a_request_goes_on_over_nodes_that_are_off_the_list(tmp_path: Path) -> None:
    """One that waits for nothing: at its text encoder, and the next nodes have nothing to do."""
    expected = pixels(await undisturbed(tmp_path))
    held = Held(*ENCODING)
    kinds = identities(workflow())
    nodes = [
        FakeNode(tmp_path, kind, {i: k for i, k in kinds.items() if k == kind}, script=held)
        for kind in ("text", "dit", "vae")
    ]
    async with gateway_over(nodes) as gateway:
        await changed(gateway, lambda: len(gateway.fleet.facts) == len(kinds))
        asked = await begun(gateway, held)
        gateway.set_workflows({})
        gateway.set_nodes([])
        for node in nodes:
            node.report(draining=True)
        held.go.set()
        assert pixels(images(await asyncio.wait_for(asked, 60))) == expected
        with pytest.raises(NotFound, match="no workflow 'sd3'"):
            await events_of(gateway, request())


async def test_a_node_that_is_needed_keeps_its_stream_beyond_a_lease(tmp_path: Path) -> None:
    held = Held()
    kinds = identities(workflow())
    vae = {identity: kind for identity, kind in kinds.items() if kind == "vae"}
    rest = {identity: kind for identity, kind in kinds.items() if kind != "vae"}
    nodes = [FakeNode(tmp_path, "a", rest, script=held), FakeNode(tmp_path, "b", vae)]
    limits = replace(CONFIG, nodes=NodeLimits(lease=1))
    async with gateway_over(nodes, config=limits) as gateway:
        await changed(gateway, lambda: len(gateway.fleet.facts) == len(kinds))
        asked = await begun(gateway, held)
        gateway.set_workflows({})
        gateway.set_nodes([])
        seen = len(nodes[1].needed)
        await nodes[1].until(lambda: len(nodes[1].needed) >= seen + 5)  # 3 in a lease
        held.go.set()
        assert len(images(await asyncio.wait_for(asked, 60))) == 1
        await nodes[1].until(lambda: not nodes[1].streams)


async def test_what_waits_at_a_node_that_goes_fails_at_once(tmp_path: Path) -> None:
    held = Held("denoise", 0)
    node = one_node(tmp_path, script=held)
    async with gateway_over([node]) as gateway:
        asked = await begun(gateway, held)
        gateway.set_workflows({})
        lease = next(each for each in node.assigned if each.stage == "denoise")
        node.report(draining=True)
        node.send(declined=declined(lease, DRAINING).declined)
        error = await error_of(asked)
        assert isinstance(error, NotFound)
        assert "'sd3' was deleted" in str(error)
        assert [each.stage for each in node.assigned].count("denoise") == 1
        assert_empty(gateway)
        held.go.set()


async def test_all_images_of_a_request_of_which_one_has_begun_end(tmp_path: Path) -> None:
    expected = pixels(await undisturbed(tmp_path, n=2))
    held = Held()
    node = one_node(tmp_path, script=held)
    async with gateway_over([node]) as gateway:
        asked = await begun(gateway, held, n=2)
        await node.until(lambda: [each.stage for each in node.assigned].count("denoise") == 2)
        gateway.set_workflows({})
        node.report(draining=True)
        # The one that it was asked for last was not begun.
        lease = [each for each in node.assigned if each.stage == "denoise"][1]
        held.stage = ""
        node.send(declined=declined(lease, DRAINING).declined)
        held.go.set()
        assert pixels(images(await asyncio.wait_for(asked, 60))) == expected


async def test_who_can_have_the_next_revision_is_not_kept_waiting(tmp_path: Path) -> None:
    """The models that go make room for it."""
    held = Held()
    sd3 = workflow()
    node = one_node(tmp_path, script=held)
    async with gateway_over([node]) as gateway:
        asked = await begun(gateway, held)
        gateway.set_workflows({"sd3": with_another("transformer", sd3)})
        lease = next(each for each in node.assigned if each.stage == "denoise")
        node.report(draining=True)
        node.send(yielded=node_pb2.Yielded(key=lease.key))
        error = await error_of(asked)
        assert (type(error), error.reason) == (Unavailable, "RevisionGone")
        await node.until(lambda: node.needed[-1:] == [set()])


async def test_a_node_of_an_older_version_stays_for_nobody(tmp_path: Path) -> None:
    """It is asked once, and not for ever."""
    held = Held()
    node = one_node(tmp_path, script=held)
    async with gateway_over([node]) as gateway:
        asked = await begun(gateway, held)
        gateway.set_workflows({})
        lease = next(each for each in node.assigned if each.stage == "denoise")
        node.report(draining=True)
        node.script = lambda node, assign, step: declined(assign, DRAINING)
        node.send(yielded=node_pb2.Yielded(key=lease.key))
        assert isinstance(await error_of(asked), NotFound)
        assert [each.stage for each in node.assigned].count("denoise") == 2
        assert_empty(gateway)
