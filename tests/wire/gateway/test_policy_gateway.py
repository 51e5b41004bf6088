# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A gateway whose requests a policy leads: over fake nodes, whose arithmetic shows any mistake."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import replace

import pytest
from fake_nodes import FakeNode, failed
from gateways import (
    CONFIG,
    assert_empty,
    changed,
    events_of,
    gateway_over,
    identities,
    images,
    kinds,
    one_node,
    request,
    workflow,
)

from kubediffusion.errors import InvalidInput, Overloaded, Unavailable
from kubediffusion.gateway.config import GatewayConfig
from kubediffusion.gateway.core import Gateway
from kubediffusion.scheduling.policies.live import NAMES, QUEUE
from kubediffusion.v1alpha1 import node_pb2
from kubediffusion.workflow import Slo

POLICY = replace(CONFIG, policy="kubediffusion")


def led(nodes, workflows=None):
    return gateway_over(nodes, workflows, POLICY)


async def undisturbed(tmp_path, **fields) -> bytes:
    """The picture as it is without a policy, from one node."""
    folder = tmp_path / "undisturbed"
    folder.mkdir(exist_ok=True)
    async with gateway_over([one_node(folder)]) as gateway:
        (image,) = images(await events_of(gateway, request(**fields)))
        return image.png


async def all_up(gateway: Gateway, count: int) -> None:
    await changed(gateway, lambda: len(gateway.fleet.states()) == count)


class Pace:
    """A node's script: the lease of this seed stops at a step until `go`, or is asked back."""

    def __init__(self, seed: int, step: int = 3) -> None:
        self.seed, self.step = seed, step
        self.go = asyncio.Event()
        self.reached = asyncio.Event()
        self.request_id = ""

    def __call__(self, node: FakeNode, assign: node_pb2.Assign, step: int) -> object:
        mine = assign.stage == "denoise" and assign.inputs["seed"].integer == self.seed
        if mine and step == self.step and not self.reached.is_set():
            self.request_id = assign.key.request_id
            self.reached.set()
            return self._held(node)
        return None

    async def _held(self, node: FakeNode) -> None:
        asked = asyncio.create_task(node.until(lambda: self.request_id in node.yields))
        go = asyncio.create_task(self.go.wait())
        await asyncio.wait([asked, go], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        go.cancel()


async def test_all_tasks_of_a_request_run_on_the_node_that_the_policy_chose(tmp_path):
    nodes = [one_node(tmp_path, name) for name in "abc"]
    at_work: dict[str, set[str]] = defaultdict(set)
    most: list[int] = []

    def watched(node, assign, step):
        works = at_work[node.name]
        works.add(assign.key.request_id)
        most.append(len(works))
        if step == -2 and assign.stage == "decode":
            works.discard(assign.key.request_id)

    async with led(nodes) as gateway:
        await all_up(gateway, 3)
        for node in nodes:
            node.script = watched
        answers = await asyncio.gather(
            *(events_of(gateway, request(seed=seed)) for seed in range(12))
        )
        for events in answers:
            assert kinds(events)[-1] == "finished"
            stages = events[-1].finished.stages
            assert len({each.node for each in stages}) == 1
            assert len(stages) == 8
        assert {each.node for events in answers for each in events[-1].finished.stages} == {
            "a", "b", "c",
        }  # fmt: skip
        assert max(most) == 1  # the queue is the gateway's, not the nodes'
        assert_empty(gateway)


@pytest.mark.parametrize("policy", [name for name in NAMES if name != QUEUE])
async def test_pictures_are_those_of_a_gateway_without_a_policy(tmp_path, policy):
    before = await undisturbed(tmp_path, seed=5)
    config = replace(CONFIG, policy=policy)
    async with gateway_over([one_node(tmp_path)], config=config) as gateway:
        (image,) = images(await events_of(gateway, request(seed=5)))
        assert image.png == before


async def test_models_on_nodes_of_their_own_are_led_as_far_as_they_lie_together(tmp_path):
    """As `up` spreads them: encoders, denoiser and decoder apart."""
    resolved = workflow()
    text = [role for role in resolved.models if role.startswith("text_encoder")]
    nodes = [
        FakeNode(tmp_path, "text", identities(resolved, *text), by_reference=True),
        FakeNode(tmp_path, "dit-1", identities(resolved, "transformer"), by_reference=True),
        FakeNode(tmp_path, "dit-2", identities(resolved, "transformer"), by_reference=True),
        FakeNode(tmp_path, "image", identities(resolved, "vae")),
    ]
    before = await undisturbed(tmp_path, seed=1)
    async with led(nodes) as gateway:
        await all_up(gateway, 4)
        answers = await asyncio.gather(
            *(events_of(gateway, request(seed=seed)) for seed in range(6))
        )
        assert images(answers[1])[0].png == before
        assert {a.stage for a in nodes[1].assigned} == {"denoise"}
        assert nodes[1].assigned
        assert nodes[2].assigned
        assert_empty(gateway)


async def test_a_lease_gives_way_to_a_more_urgent_request_and_its_picture_is_the_same(tmp_path):
    before = await undisturbed(tmp_path, seed=1)
    node = one_node(tmp_path)
    node.run_seconds = {"denoise": 10.0}
    async with led([node]) as gateway:
        await events_of(gateway, request(seed=0))  # measures
        pace = node.script = Pace(seed=1)
        slow = asyncio.create_task(events_of(gateway, request(seed=1)))
        await asyncio.wait_for(pace.reached.wait(), 60)
        urgent = await events_of(gateway, request(seed=2, deadline_ms=15_000))
        assert kinds(urgent)[-1] == "finished"
        events = await slow
        (resumed,) = [e.resumed for e in events if e.WhichOneof("kind") == "resumed"]
        assert (resumed.reason, resumed.from_step) == ("Revoked", pace.step)
        assert images(events)[0].png == before
        assert node.steps[pace.request_id] == 8  # none lost, none twice
        assert_empty(gateway)


async def test_what_cannot_be_on_time_beside_others_is_shed_before_anything_is_spent(tmp_path):
    node = one_node(tmp_path)
    node.run_seconds = {"denoise": 10.0}
    async with led([node]) as gateway:
        await events_of(gateway, request(seed=0))
        pace = node.script = Pace(seed=1)
        first = asyncio.create_task(events_of(gateway, request(seed=1, deadline_ms=12_000)))
        await asyncio.wait_for(pace.reached.wait(), 60)
        assigned = len(node.assigned)
        with pytest.raises(Overloaded) as caught:
            await events_of(gateway, request(seed=2, deadline_ms=15_000))
        assert caught.value.reason == "DeadlineInfeasible"
        assert caught.value.retry_after > 1.0
        assert len(node.assigned) == assigned
        shed = gateway.measures.registry.get_sample_value(
            "kubediffusion_gateway_shed_total",
            {"workflow": "sd3", "reason": "DeadlineInfeasible"},
        )
        assert shed == 1.0
        pace.go.set()
        assert kinds(await first)[-1] == "finished"
        assert_empty(gateway)


async def test_a_service_level_refuses_what_was_not_begun_and_cuts_nothing_off(tmp_path):
    """Its time is long past when the last step is done, and the picture comes all the same."""
    node = one_node(tmp_path)
    node.run_seconds = {"denoise": 10.0}
    async with led([node], {"sd3": workflow(Slo(deadline_seconds=12.0))}) as gateway:
        await events_of(gateway, request(seed=0))
        pace = node.script = Pace(seed=1, step=7)
        first = asyncio.create_task(events_of(gateway, request(seed=1)))
        await asyncio.wait_for(pace.reached.wait(), 60)
        with pytest.raises(Overloaded):
            await events_of(gateway, request(seed=2))
        # A node drains: what it gives back can only be late, and waits for another.
        drained = node.drained = asyncio.Event()
        second = FakeNode(tmp_path, "b", identities(workflow()))
        await second.start()
        gateway.profiles.observe_run(_denoiser(), "denoise", "cpu-1", 1.0, 1e6)
        gateway.set_nodes([node.address, second.address])
        await changed(gateway, lambda: len(gateway.fleet.states()) == 2)
        await node.stop()
        drained.set()
        events = await asyncio.wait_for(first, 60)
        assert kinds(events)[-1] == "finished"
        await second.stop()
        assert_empty(gateway)


def _denoiser() -> str:
    return workflow().models["transformer"].identity


async def test_requests_without_a_deadline_all_come_to_an_end(tmp_path):
    node = one_node(tmp_path)
    node.run_seconds = {"denoise": 100.0}  # as it says: by that the last would take an hour
    async with led([node]) as gateway:
        await events_of(gateway, request(seed=99))
        answers = await asyncio.gather(
            *(events_of(gateway, request(seed=seed, n=2)) for seed in range(20))
        )
        assert all(len(images(events)) == 2 for events in answers)
        assert_empty(gateway)


@pytest.mark.parametrize("dies_at", [-1, 0, 1, 6, 7, -2])
@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
async def test_a_node_that_dies_loses_no_request(tmp_path, stage, dies_at):
    if stage != "denoise" and dies_at >= 0:
        return
    before = await undisturbed(tmp_path, seed=3)
    died: list[str] = []

    def die(node, assign, step):
        if assign.stage == stage and step == dies_at and not died:
            died.append(node.name)
            return "die"
        return None

    nodes = [one_node(tmp_path, name, script=die, by_reference=True) for name in "ab"]
    async with led(nodes) as gateway:
        await all_up(gateway, 2)
        answers = await asyncio.gather(
            *(events_of(gateway, request(seed=seed)) for seed in (3, 4, 5, 6))
        )
        assert died
        assert images(answers[0])[0].png == before
        assert all(kinds(events)[-1] == "finished" for events in answers)
        for node in nodes:
            assert all(count <= 8 + CONFIG.checkpoint_every for count in node.steps.values())
        assert_empty(gateway)


async def test_a_lease_goes_on_where_its_checkpoint_is_of_use(tmp_path):
    died: list[str] = []

    def die(node, assign, step):
        if node.name == "a" and assign.stage == "denoise" and step == 6 and not died:
            died.append(assign.key.request_id)
            return "die"
        return None

    nodes = [
        one_node(tmp_path, name, script=die, fingerprint=kind)
        for name, kind in (("a", "cpu-1"), ("b", "cpu-2"), ("c", "cpu-1"))
    ]
    async with led(nodes) as gateway:
        await all_up(gateway, 3)
        before, begun = len(died), request(seed=3)
        while len(died) == before:
            events = await events_of(gateway, begun)
        (resumed,) = [e.resumed for e in events if e.WhichOneof("kind") == "resumed"]
        assert resumed.from_step == 4
        assert [node.steps[died[0]] for node in nodes] == [6, 0, 4]
        assert_empty(gateway)


async def test_a_task_that_failed_on_a_node_runs_on_another(tmp_path):
    def fail(node, assign, step):
        if node.name == "a" and assign.stage == "denoise" and step == 4:
            return failed(assign, node_pb2.FAILURE_REASON_INTERNAL, "nan")
        return None

    nodes = [one_node(tmp_path, name, script=fail) for name in "ab"]
    async with led(nodes) as gateway:
        await all_up(gateway, 2)
        for seed in range(4):
            assert kinds(await events_of(gateway, request(seed=seed)))[-1] == "finished"
        on_a = [each for each in nodes[0].assigned if each.stage == "denoise"]
        assert len({each.key.request_id for each in on_a}) == len(on_a)
        assert_empty(gateway)


async def test_a_client_that_leaves_frees_its_place(tmp_path):
    node = one_node(tmp_path)
    async with led([node]) as gateway:
        pace = node.script = Pace(seed=1)
        first = asyncio.create_task(events_of(gateway, request(seed=1)))
        await asyncio.wait_for(pace.reached.wait(), 60)
        waiting = gateway.generate(request(seed=2))
        assert (await anext(waiting)).WhichOneof("kind") == "queued"
        await asyncio.sleep(0)  # the round of this turn
        assert gateway.debug_counts()["jobs"] == 2
        assert gateway.status().queued >= 1
        await waiting.aclose()
        assert gateway.debug_counts()["jobs"] == 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert_empty(gateway)
        await node.until(lambda: pace.request_id in node.cancelled)
        assert kinds(await events_of(gateway, request(seed=3)))[-1] == "finished"


async def test_a_gateway_that_stops_leaves_nothing_behind(tmp_path):
    node = one_node(tmp_path)
    pace = Pace(seed=1)
    async with led([node]) as gateway:
        node.script = pace
        asked = [
            asyncio.create_task(events_of(gateway, request(seed=seed))) for seed in range(1, 5)
        ]
        await asyncio.wait_for(pace.reached.wait(), 60)
        await gateway.stop()
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(outcome, Unavailable)
        assert_empty(gateway)


async def test_a_model_without_a_node_is_waited_for(tmp_path):
    node = one_node(tmp_path)
    async with led([node]) as gateway:
        await events_of(gateway, request(seed=0))
        gone = _denoiser()
        kind = node.models.pop(gone)
        node.report(residency_generation=1)
        await changed(gateway, lambda: bool(gateway.fleet.missing([gone])))
        seen: list[str] = []
        async for event in gateway.generate(request(seed=1, deadline_ms=60_000)):
            seen.append(event.WhichOneof("kind") or "")
            if seen[-1] == "started" and gone not in node.models:
                # Its encoders are there, and run meanwhile.
                assert event.started.stage == "encode"
                node.models[gone] = kind
                node.report(residency_generation=2)
        assert seen.count("queued") >= 1
        assert seen[-1] == "finished"
        assert_empty(gateway)


async def test_beside_another_gateway_its_work_keeps_a_node_from_ours(tmp_path):
    nodes = [one_node(tmp_path, name) for name in "ab"]
    async with led(nodes) as gateway:
        await all_up(gateway, 2)
        nodes[0].report(gateways=2, running=1, queued_seconds=300.0)
        await changed_load(gateway, nodes[0].address)
        for seed in range(3):
            events = await events_of(gateway, request(seed=seed))
            assert {each.node for each in events[-1].finished.stages} == {"b"}


async def changed_load(gateway: Gateway, address: str) -> None:
    connection = gateway.fleet.connections[address]
    async with asyncio.timeout(60):
        while connection.load.gateways != 2:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_policy_that_breaks_is_replaced_and_nothing_is_lost(tmp_path):
    nodes = [one_node(tmp_path, name) for name in "ab"]
    async with led(nodes) as gateway:
        await all_up(gateway, 2)
        assert gateway.driver is not None
        broken, left = gateway.driver.policy, 12

        def decide(now: float) -> object:
            nonlocal left
            left -= 1
            if not left:
                raise ZeroDivisionError
            return type(broken).decide(broken, now)  # type: ignore[arg-type]

        broken.decide = decide  # type: ignore[method-assign, assignment]
        answers = await asyncio.gather(
            *(events_of(gateway, request(seed=seed)) for seed in range(12))
        )
        assert all(kinds(events)[-1] == "finished" for events in answers)
        assert gateway.driver.policy is not broken
        assert_empty(gateway)


async def test_a_policy_that_breaks_holds_up_no_client_that_leaves(tmp_path):
    node = one_node(tmp_path)
    async with led([node]) as gateway:
        assert gateway.driver is not None
        pace = node.script = Pace(seed=1)
        asked = asyncio.create_task(events_of(gateway, request(seed=1)))
        await asyncio.wait_for(pace.reached.wait(), 60)
        broken = gateway.driver.policy
        broken.ended = None  # type: ignore[method-assign, assignment]
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert gateway.driver.policy is not broken
        assert_empty(gateway)
        assert kinds(await events_of(gateway, request(seed=2)))[-1] == "finished"


def test_a_policy_that_is_not_there_is_named():
    with pytest.raises(InvalidInput, match="kubediffusion-fair"):
        Gateway(GatewayConfig(policy="fastest"))
