# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Leases that share their steps, and what becomes of the others when a shared step fails."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from puppets import Gateway, PuppetDenoising, Rig

from kubediffusion.models.base import CheckpointState
from kubediffusion.v1alpha1 import node_pb2

STEPS = 5


async def denoise(rig: Rig, gateway: Gateway, requests: Sequence[str]) -> None:
    """Assigns all before the first one has done its first step."""
    rig.strings.hold()
    for i, request in enumerate(requests):
        inputs = {"steps": STEPS, "seed": i}
        await gateway.denoise(request, 1, 0, numerics=node_pb2.NUMERICS_FAST, inputs=inputs)
    await gateway.event("accepted", requests[-1])
    rig.strings.release()


async def untroubled(rig: Rig, gateway: Gateway, count: int) -> list[bytes]:
    """Latents of as many leases, seed by seed, each by itself."""
    latents = []
    for i in range(count):
        await gateway.denoise(f"calm{i}", inputs={"steps": STEPS, "seed": i})
        done = await gateway.event("done", f"calm{i}")
        latents.append(done.outputs["latents"].tensor.inline)
    rig.strings.batches.clear()
    return latents


async def test_of_a_batch_that_fails_only_the_lease_at_fault_fails(rig: Rig) -> None:
    gateway = await rig.gateway()
    first, _, third = await untroubled(rig, gateway, 3)

    def fail(label: str, batch: int) -> None:
        if label == "b" and "a+b+c" in rig.strings.ran:
            raise RuntimeError("nan")

    # The batch fails when `a` has done its part of the step, and `c` not yet.
    rig.strings.fail_within = fail
    await denoise(rig, gateway, "abc")
    assert (await gateway.event("failed", "b")).reason == node_pb2.FAILURE_REASON_INTERNAL
    for request, latents in (("a", first), ("c", third)):
        done = await gateway.event("done", request)
        assert done.outputs["latents"].tensor.inline == latents
        assert done.timing.steps_run == STEPS
    # Without the one at fault the others share their steps again.
    assert "a+c" in rig.strings.ran
    assert len(gateway.all("failed")) == 1


async def test_leases_that_fail_only_together_go_on_each_alone(rig: Rig) -> None:
    gateway = await rig.gateway()
    expected = await untroubled(rig, gateway, 3)

    def fail(label: str, batch: int) -> None:
        if batch > 1:
            raise MemoryError("too large")

    rig.strings.fail_within = fail
    await denoise(rig, gateway, "abc")
    for request, latents in zip("abc", expected, strict=True):
        done = await gateway.event("done", request)
        assert done.outputs["latents"].tensor.inline == latents
    assert len([size for size in rig.strings.batches if size > 1]) <= 2
    # Those that come later may share again.
    rig.strings.fail_within = lambda label, batch: None
    rig.strings.batches.clear()
    await denoise(rig, gateway, "de")
    await gateway.event("done", "d")
    await gateway.event("done", "e")
    assert 2 in rig.strings.batches


async def test_no_lease_is_tried_again_on_a_device_past_help(rig: Rig) -> None:
    def fail(label: str, batch: int) -> None:
        if batch > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rig.strings.fail_within = fail
    gateway = await rig.gateway()
    await denoise(rig, gateway, "ab")
    await gateway.event("failed", "a")
    await gateway.event("failed", "b")
    await rig.server.drain_asked.wait()
    assert "illegal memory access" in rig.server.poisoned
    assert rig.strings.batches[-1] == 2


async def test_a_lease_that_cannot_be_started_again_fails_and_the_other_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await rig.gateway()
    _, second = await untroubled(rig, gateway, 2)
    model = rig.shelf.models["dit"]
    start = model.start

    def fail(label: str, batch: int) -> None:
        if batch > 1:
            raise RuntimeError("bug")

    def start_but_not_again(inputs, loras, resume, *rest):
        if resume is not None and inputs["label"] == "a":
            raise MemoryError("no room")
        return start(inputs, loras, resume, *rest)

    rig.strings.fail_within = fail
    monkeypatch.setattr(model, "start", start_but_not_again)
    await denoise(rig, gateway, "ab")
    assert (await gateway.event("failed", "a")).reason == node_pb2.FAILURE_REASON_OUT_OF_MEMORY
    assert (await gateway.event("done", "b")).outputs["latents"].tensor.inline == second


async def test_a_batch_without_checkpoints_to_go_back_to_steps_one_by_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checkpoint(self: PuppetDenoising) -> CheckpointState:
        raise MemoryError("no room")

    gateway = await rig.gateway()
    expected = await untroubled(rig, gateway, 2)
    monkeypatch.setattr(PuppetDenoising, "checkpoint", checkpoint)
    await denoise(rig, gateway, "ab")
    for request, latents in zip("ab", expected, strict=True):
        done = await gateway.event("done", request)
        assert done.outputs["latents"].tensor.inline == latents
    assert set(rig.strings.batches) == {1}
