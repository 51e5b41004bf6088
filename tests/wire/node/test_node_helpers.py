# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A lease whose steps another node computes a part of: a branch of guidance, or a ControlNet.

Whatever becomes of the helper, the picture is the one that the lease's node draws alone, and
nothing stays behind on either node.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from helped_nodes import (
    BRANCH,
    CONTROL,
    DIT,
    NET,
    STEPS,
    denoise,
    drawn,
    helper,
    here,
    latents,
    node,
    standin,
)
from puppets import Rig

from kubediffusion.v1alpha1 import node_pb2

LOST = node_pb2.FAILURE_REASON_HELPER_LOST


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Rig, Rig]]:
    """Two nodes with the transformer; the second has the ControlNet too."""
    one = await node(tmp_path, "one", DIT)
    two = await node(tmp_path, "two", DIT, NET)
    yield one, two
    await one.stop()
    await two.stop()


def count(rig: Rig, name: str, **labels: str) -> float:
    return rig.server.registry.get_sample_value(f"kubediffusion_node_{name}", labels) or 0.0


async def settles(condition: Callable[[], bool]) -> None:
    """Looks again and again: what is waited for happens on several threads of two nodes."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def joined(rig: Rig) -> None:
    """Until the one helper of its leases is there: it is asked from the next step on."""
    links = rig.server.node.assisting._links
    await settles(lambda: [link.opened for link in links.values()] == [True])


async def nothing_left(*rigs: Rig) -> None:
    for rig in rigs:
        await settles(
            lambda rig=rig: (
                not rig.server.node.tasks
                and not len(rig.server.node.helpers)
                and not rig.server.node.assisting._links
                and not rig.store.stats().tensors
            )
        )


async def test_a_branch_elsewhere_gives_the_picture_of_one_node(pair: tuple[Rig, Rig]) -> None:
    one, two = pair
    expected = await drawn(one)
    gateway = await one.gateway()
    one.strings.hold()
    await denoise(gateway, "r", helper(two))
    await joined(one)
    one.strings.release()
    done = await gateway.event("done", "r")
    assert latents(done) == expected
    assert done.timing.steps_helped >= STEPS - 1
    assert done.timing.steps_run == STEPS
    assert two.strings.ran.count("branch") == done.timing.steps_helped
    assert count(one, "assisted_steps_total", model="dit", stage="branch") == STEPS - 1
    assert count(one, "assists_total", model="dit", stage="branch", outcome="done") == 1
    ended = count(two, "tasks_total", model="dit", stage="branch", outcome="done")
    assert ended == done.timing.steps_helped
    await nothing_left(one, two)


async def test_a_lost_or_doubled_branch_would_show() -> None:
    """The stand-in is fit for these tests."""
    from kubediffusion import models
    from kubediffusion.models.base import LoadSpec, Part

    denoiser = models.load(LoadSpec("id", "standin", "transformer", Path(), Path()))
    seen: set[int] = set()
    for times in (0, 1, 2):
        denoising = denoiser.start({"steps": 1, "negative": "ugly"})
        branch = denoiser.help(Part.BRANCH, denoiser.constants(denoising, Part.BRANCH, ""))
        value = branch.compute(denoiser.part_step(denoising, Part.BRANCH, ""))[0]
        denoiser.assemble(denoising, {(Part.BRANCH, ""): [value * times]})
        seen.add(denoising.state)
    assert len(seen) == 3


@pytest.mark.parametrize("wide", [1, 20_000])
async def test_a_control_net_elsewhere_gives_the_same_bytes(
    pair: tuple[Rig, Rig], wide: int
) -> None:
    one, two = pair
    expected = await drawn(two, here(), fast=False)
    two.shelf.wide = wide  # large ones go through shared memory
    gateway = await one.gateway()
    await denoise(gateway, "r", helper(two, CONTROL), fast=False)
    done = await gateway.event("done", "r")
    assert latents(done) == expected != await drawn(one, fast=False)
    assert done.timing.steps_helped == STEPS
    assert two.strings.ran.count("control") == STEPS
    await nothing_left(one, two)


async def test_the_device_is_for_others_while_a_lease_waits(pair: tuple[Rig, Rig]) -> None:
    one, two = pair
    gateway = await one.gateway()
    two.strings.hold()
    await denoise(gateway, "r", helper(two, CONTROL), fast=False)
    await two.strings.started("control")
    other = await drawn(one, fast=False)
    assert other
    assert gateway.kinds() == ["welcome", "accepted"]
    two.strings.release()
    assert (await gateway.event("done", "r")).timing.steps_run == STEPS


async def test_two_leases_share_a_helper(pair: tuple[Rig, Rig]) -> None:
    one, two = pair
    expected = {
        seed: await drawn(two, here(), fast=False, inputs={"seed": seed}) for seed in (1, 2)
    }
    gateway = await one.gateway()
    for seed in (1, 2):
        await denoise(gateway, f"r{seed}", helper(two, CONTROL), fast=False, inputs={"seed": seed})
    for seed in (1, 2):
        assert latents(await gateway.event("done", f"r{seed}")) == expected[seed]
    assert two.strings.ran.count("control") == 2 * STEPS
    await nothing_left(one, two)


@pytest.mark.parametrize(("priority", "before"), [(5, 1), (-5, STEPS)])
async def test_a_part_is_in_the_class_of_its_lease(
    pair: tuple[Rig, Rig], priority: int, before: int
) -> None:
    one, two = pair
    gateway, other = await one.gateway(), await two.gateway("g2")
    two.strings.hold()
    await denoise(other, "own", fast=False)
    await two.strings.started("step")
    await denoise(gateway, "r", helper(two, CONTROL), fast=False, priority=priority)
    await settles(lambda: len(two.server.node.tasks) == 2)
    two.strings.release()
    await gateway.event("done", "r")
    first = two.strings.ran.index("control")
    assert two.strings.ran[:first].count("step") == before


async def test_a_helper_that_others_need_is_left_at_once(pair: tuple[Rig, Rig]) -> None:
    one, two = pair
    expected = await drawn(one)
    gateway, other = await one.gateway(), await two.gateway("g2")
    await helped_step(one, two, gateway)
    await denoise(other, "urgent", fast=False)
    await settles(lambda: not len(two.server.node.helpers))
    one.strings.release()
    done = await gateway.event("done", "r")
    assert latents(done) == expected
    assert 1 <= done.timing.steps_helped < STEPS - 1
    assert count(one, "assists_total", model="dit", stage="branch", outcome="ended") == 1
    assert (await other.end_of("urgent"))[0] == "done"
    await gateway.send(release=node_pb2.Release(request_ids=["r"]))
    await nothing_left(one, two)


async def helped_step(one: Rig, two: Rig, gateway: object) -> None:
    """A lease of which one step was helped, held in its next one."""
    one.strings.hold()
    await denoise(gateway, "r", helper(two))  # type: ignore[arg-type]
    await joined(one)
    while "helped" not in one.strings.ran:
        seen = len(one.strings.ran)
        one.strings.release(1)
        await settles(lambda seen=seen: len(one.strings.ran) > seen)
    one.strings.release(1)
    await settles(lambda: one.strings.ran[-1] in ("own", "step", "alone"))


async def test_a_busy_node_does_not_help(pair: tuple[Rig, Rig]) -> None:
    one, two = pair
    expected = await drawn(one)
    two.strings.hold()
    other = await two.gateway("g2")
    await denoise(other, "first")
    await two.strings.started("step")
    gateway = await one.gateway()
    await denoise(gateway, "r", helper(two))
    done = await gateway.event("done", "r")
    assert latents(done) == expected
    assert not done.timing.steps_helped
    two.strings.release()


@pytest.mark.parametrize("kind", [BRANCH, CONTROL])
async def test_a_helper_that_dies_in_the_middle(pair: tuple[Rig, Rig], kind: int) -> None:
    one, two = pair
    expected = await drawn(one)
    gateway = await one.gateway()
    two.strings.hold()
    await denoise(gateway, "r", helper(two, kind), fast=kind == BRANCH)
    two.strings.release(2)
    what = "branch" if kind == BRANCH else "control"
    if kind == CONTROL:
        await two.strings.started(what, 3)
        await two.server._grpc.stop(0)  # type: ignore[union-attr]
        two.strings.release()
        failed = await gateway.event("failed", "r")
        assert failed.reason == LOST
        assert "edges" in failed.message
        assert gateway.all("checkpoint", "r")[-1].checkpoint.step == 2
    else:
        await two.server._grpc.stop(0)  # type: ignore[union-attr]
        two.strings.release()
        assert latents(await gateway.event("done", "r")) == expected
    await nothing_left(one)


async def test_a_slow_helper_is_left_and_its_step_computed_here(
    pair: tuple[Rig, Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    expected = await drawn(one)
    monkeypatch.setattr("kubediffusion.node.assisting.patience", lambda *_, **__: 0.05)
    gateway = await one.gateway()
    one.strings.hold()
    two.strings.hold()
    await denoise(gateway, "r", helper(two))
    await joined(one)
    one.strings.release()
    done = await gateway.event("done", "r")
    assert latents(done) == expected
    assert not done.timing.steps_helped
    assert count(one, "assists_total", model="dit", stage="branch", outcome="slow") == 1
    two.strings.release()
    await nothing_left(one, two)


@pytest.mark.parametrize("how", ["yield", "cancel", "gateway"])
async def test_a_lease_that_waits_for_its_helper_can_be_taken_away(
    pair: tuple[Rig, Rig], how: str
) -> None:
    one, two = pair
    expected = await drawn(two, here(), fast=False)
    gateway = await one.gateway()
    two.strings.hold()
    await denoise(gateway, "r", helper(two, CONTROL), fast=False)
    two.strings.release(2)
    await two.strings.started("control", 3)
    key = node_pb2.TaskKey(request_id="r", task="denoise", epoch=1)
    if how == "gateway":
        await gateway.leave()
    elif how == "cancel":
        await gateway.send(cancel=node_pb2.Cancel(request_id="r"))
        assert (await gateway.event("failed", "r")).reason == node_pb2.FAILURE_REASON_CANCELLED
    else:
        await gateway.send(**{"yield": node_pb2.Yield(key=key)})
        checkpoint = (await gateway.event("yielded", "r")).checkpoint
        assert checkpoint.step == 2
    two.strings.release()
    await nothing_left(one, two)
    if how == "yield":
        again = await two.gateway("g3")
        await denoise(again, "r", here(), fast=False, resume=checkpoint, epoch=2)
        assert latents(await again.event("done", "r")) == expected


async def test_a_helper_whose_lease_was_lost_frees_everything(pair: tuple[Rig, Rig]) -> None:
    one, two = pair
    two.shelf.wide = 20_000
    gateway = await one.gateway()
    two.strings.hold()
    await denoise(gateway, "r", helper(two, CONTROL), fast=False)
    two.strings.release(1)
    await two.strings.started("control", 2)
    await one.server._grpc.stop(0)  # type: ignore[union-attr]
    await one.server.node.assisting.stop()
    two.strings.release()
    await nothing_left(two)


@pytest.mark.parametrize("what", ["drain", "evict"])
async def test_a_helper_that_goes_says_so(pair: tuple[Rig, Rig], what: str) -> None:
    one, two = pair
    expected = await drawn(one)
    gateway = await one.gateway()
    await helped_step(one, two, gateway)
    if what == "drain":
        going = asyncio.create_task(two.server.node.drain())
        await going
    else:
        await two.plan(2, [standin("net", "controlnet")])
        await two.settled()
    await settles(lambda: not len(two.server.node.helpers))

    def ended() -> float:
        return count(one, "assists_total", model="dit", stage="branch", outcome="ended")

    await settles(lambda: ended() == 1)  # before the lease has: then nobody asks any more
    one.strings.release()
    assert latents(await gateway.event("done", "r")) == expected
    await nothing_left(one, two)


@pytest.mark.parametrize(
    ("fields", "field", "word"),
    [
        ({"fast": False}, "numerics", "numerics fast"),
        ({"budget": 0.6}, "budget", "pruned"),
    ],
)
async def test_branches_stay_together_where_bits_or_tokens_count(
    pair: tuple[Rig, Rig], fields: dict[str, object], field: str, word: str
) -> None:
    one, two = pair
    gateway = await one.gateway()
    await denoise(gateway, "r", helper(two), **fields)  # type: ignore[arg-type]
    failed = await gateway.event("failed", "r")
    assert failed.reason == node_pb2.FAILURE_REASON_INVALID_INPUT
    assert failed.field == field
    assert word in failed.message


async def test_assist_begins_with_what_is_wanted(pair: tuple[Rig, Rig]) -> None:
    one, two = pair
    call = two.stub.Assist()
    await call.write(node_pb2.AssistRequest(step=node_pb2.AssistStep()))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    opening = node_pb2.AssistOpen(
        key=node_pb2.TaskKey(request_id="r", task="denoise", epoch=1),
        helper=node_pb2.Helper(kind=CONTROL, model="gone"),
        protocol=node_pb2.ProtocolRange(min=1, max=1),
    )
    call = two.stub.Assist()
    await call.write(node_pb2.AssistRequest(open=opening))
    answer = await call.read()
    assert answer.failed.reason == LOST
    assert "not ready" in answer.failed.message
    await nothing_left(one, two)


async def test_exact_residuals_come_from_an_equal_node_only(tmp_path: Path) -> None:
    one = await node(tmp_path, "one", DIT)
    two = await node(tmp_path, "two", DIT, NET)
    two.server.node.helpers.fingerprint = "another"
    gateway = await one.gateway()
    await denoise(gateway, "r", helper(two, CONTROL), fast=False)
    failed = await gateway.event("failed", "r")
    assert failed.reason == LOST
    assert "bits" in failed.message
    await nothing_left(one, two)
    await one.stop()
    await two.stop()


async def test_the_report_says_whom_a_node_helps(pair: tuple[Rig, Rig]) -> None:
    one, two = pair
    gateway, watcher = await one.gateway(), await two.gateway("g2")
    one.strings.hold()
    await denoise(gateway, "r", helper(two))
    assert (await watcher.load(lambda report: report.helping == 1)).helping == 1
    assert count(two, "helping") == 1
    one.strings.release()
    await gateway.event("done", "r")
    assert (await watcher.load(lambda report: report.helping == 0)).helping == 0
