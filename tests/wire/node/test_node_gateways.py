# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Several gateways at one node: they never talk to each other, so it is here that they are fair."""

from __future__ import annotations

from puppets import Gateway, Rig

from kubediffusion.v1alpha1 import node_pb2


def order_of(rig: Rig) -> list[str]:
    """The leases in the order in which each was first stepped."""
    return list(dict.fromkeys(rig.strings.ran))


async def lease(gateway: Gateway, request: str, tenant: str, **fields: object) -> None:
    await gateway.denoise(request, inputs={"steps": 2}, tenant=tenant, **fields)
    await gateway.event("accepted", request)


async def test_a_node_says_how_many_gateways_it_serves(rig: Rig) -> None:
    first = await rig.gateway("g1")
    assert first.node.load.gateways == 1
    second = await rig.gateway("g2")
    await first.load(lambda load: load.gateways == 2)
    await second.leave()
    seen = len(first.events)

    def alone(load: node_pb2.LoadReport) -> bool:
        return load.gateways == 1 and any(load is body for _, body in first.events[seen:])

    await first.load(alone)
    await first.leave()


async def test_a_tenant_of_one_gateway_does_not_wait_behind_all_of_anothers(rig: Rig) -> None:
    busy, quiet = await rig.gateway("g1"), await rig.gateway("g2")
    rig.strings.hold()
    await lease(busy, "a1", "a")
    await rig.strings.started("a1")
    for request in ("a2", "a3", "a4"):
        await lease(busy, request, "a")
    await lease(quiet, "b1", "b")
    rig.strings.release()
    await busy.event("done", "a4")
    await quiet.event("done", "b1")
    assert order_of(rig) == ["a1", "b1", "a2", "a3", "a4"]


async def test_a_tenant_gains_nothing_by_coming_through_two_gateways(rig: Rig) -> None:
    one, two = await rig.gateway("g1"), await rig.gateway("g2")
    rig.strings.hold()
    await lease(one, "a1", "a")
    await rig.strings.started("a1")
    await lease(one, "a2", "a")
    await lease(two, "a3", "a")
    await lease(one, "a4", "a")
    await lease(one, "b1", "b")
    rig.strings.release()
    await one.event("done", "a4")
    await two.event("done", "a3")
    assert order_of(rig) == ["a1", "b1", "a2", "a3", "a4"]


async def test_priority_counts_across_gateways(rig: Rig) -> None:
    plain, urgent = await rig.gateway("g1"), await rig.gateway("g2")
    rig.strings.hold()
    await lease(plain, "a1", "a")
    await rig.strings.started("a1")
    await lease(plain, "a2", "a")
    await lease(urgent, "now", "z", priority=5)
    rig.strings.release()
    await plain.event("done", "a2")
    await urgent.event("done", "now")
    # At the next step, not at the lease's end.
    assert rig.strings.ran == ["a1", "now", "now", "a1", "a2", "a2"]
