# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Whom a gateway asks to compute a part of a lease's steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_nodes import FakeNode, failed
from gateways import assert_empty, changed, events_of, gateway_over, identities, images, request
from gateways import workflow as sd3

from kubediffusion.gateway.core import Gateway
from kubediffusion.gateway.helpers import Helpers, observe
from kubediffusion.gateway.plan import PlannedTask
from kubediffusion.scheduling.assist import DIVIDED
from kubediffusion.scheduling.profiles import Profiles
from kubediffusion.v1alpha1 import node_pb2

FAST = node_pb2.NUMERICS_FAST
BRANCH = node_pb2.Helper.KIND_CFG_BRANCH
DIT = sd3().models["transformer"].identity


def fleet(tmp_path: Path, **more: object) -> list[FakeNode]:
    """Two nodes with the transformer, and one with everything else."""
    rest = {model: kind for model, kind in identities(sd3()).items() if kind != "dit"}
    dit = identities(sd3(), "transformer")
    return [
        FakeNode(tmp_path, "a", dit, **more),  # type: ignore[arg-type]
        FakeNode(tmp_path, "b", dit, **more),  # type: ignore[arg-type]
        FakeNode(tmp_path, "c", rest),
    ]


def leases(nodes: list[FakeNode]) -> list[tuple[str, node_pb2.Assign]]:
    return [
        (node.address, assign)
        for node in nodes
        for assign in node.assigned
        if assign.stage == "denoise"
    ]


async def measured(gateway: Gateway) -> None:
    """As if a step took a second, and all nodes are there."""
    await changed(gateway, lambda: len(gateway.fleet.states()) == 3)
    for _ in range(20):
        gateway.profiles.observe_run(DIT, "denoise", "cpu-1", 1.0, 1.0)


async def test_an_idle_node_gets_a_branch_of_guidance(tmp_path: Path) -> None:
    nodes = fleet(tmp_path)
    async with gateway_over(nodes) as gateway:
        await measured(gateway)
        assert images(await events_of(gateway, request(numerics=FAST)))
        ((address, lease),) = leases(nodes)
        (helper,) = lease.lease.helpers
        other = {nodes[0].address, nodes[1].address} - {address}
        assert (helper.kind, helper.model, {helper.address}) == (BRANCH, DIT, other)
        assert_empty(gateway)
        assert not any(node.helping for node in gateway.fleet.connections.values())


@pytest.mark.parametrize("why", ["exact", "no guidance", "busy", "helping"])
async def test_a_lease_goes_alone(tmp_path: Path, why: str) -> None:
    nodes = fleet(tmp_path)
    async with gateway_over(nodes) as gateway:
        await measured(gateway)
        fields: dict[str, object] = {"numerics": FAST}
        if why == "exact":
            fields = {}
        elif why == "no guidance":
            fields["guidance"] = 1.0
        else:
            said = {"queued": 3} if why == "busy" else {"helping": 1}
            loads = [c for c in gateway.fleet.connections.values() if c.node_id in "ab"]
            for node in nodes[:2]:
                node.report(**said)
            name = next(iter(said))
            await gateway_hears(lambda: all(getattr(each.load, name) for each in loads))
        assert images(await events_of(gateway, request(**fields)))
        ((_, lease),) = leases(nodes)
        assert not lease.lease.helpers


async def gateway_hears(condition) -> None:
    import asyncio

    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_lost_helper_is_not_the_fault_of_the_leases_node(tmp_path: Path) -> None:
    """It is tried again at once, without that helper and without blame for its own node."""
    tried: list[str] = []

    def script(node: FakeNode, assign: node_pb2.Assign, step: int) -> object:
        if assign.stage != "denoise" or step != 2 or tried:
            return None
        tried.append(node.address)
        return failed(assign, node_pb2.FAILURE_REASON_HELPER_LOST, "it is gone")

    nodes = fleet(tmp_path, script=script)
    async with gateway_over(nodes) as gateway:
        await measured(gateway)
        assert images(await events_of(gateway, request(numerics=FAST)))
        first, second = sorted(leases(nodes), key=lambda each: each[1].key.epoch)
        assert first[1].lease.helpers
        assert second[1].key.epoch == 2
        assert first[1].lease.helpers[0].address not in [
            helper.address for helper in second[1].lease.helpers
        ]


def test_a_helped_run_says_nothing_of_what_a_node_takes_alone() -> None:
    profiles = Profiles()
    planned = PlannedTask("denoise", "dit", "denoise", node_pb2.Assign(), {}, units=10, steps=10)
    timing = node_pb2.Timing(
        run_seconds=1.0, steps_run=10, steps_helped=9, helper_wait_seconds=0.25
    )
    observe(profiles, planned, "f", 10.0, timing)
    assert profiles.measured_run("dit", "denoise", "f", 10.0) is None
    assert profiles.measured_run("dit", DIVIDED, "f", 10.0) == 1.25
    timing.steps_helped = 3  # neither the one nor the other
    observe(profiles, planned, "f", 10.0, timing)
    assert profiles.measured_run("dit", DIVIDED, "f", 10.0) == 1.25
    timing.steps_helped = 0
    observe(profiles, planned, "f", 10.0, timing)
    assert profiles.measured_run("dit", "denoise", "f", 10.0) == 1.0


def test_control_nets_on_the_leases_own_node_have_no_address() -> None:
    lease = node_pb2.Lease()
    planned = PlannedTask(
        "denoise", "dit", "denoise", node_pb2.Assign(), {}, helpers=(("edges", "net"),)
    )
    Helpers().add_to(lease, planned)
    assert [(h.name, h.model, h.address) for h in lease.helpers] == [("edges", "net", "")]
