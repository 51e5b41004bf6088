# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Budgets on their way to the model, and what of them a node tells."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client import generate_latest
from puppets import Rig

from kubediffusion.models.base import Measures, StepCache
from kubediffusion.v1alpha1 import node_pb2

FAST = node_pb2.NUMERICS_FAST


async def test_a_leases_budget_reaches_the_denoiser(rig: Rig) -> None:
    gateway = await rig.gateway()
    await gateway.denoise("pruned", budget=0.6)
    await gateway.denoise("dense")
    for request in ("pruned", "dense"):
        await gateway.event("done", request)
    assert rig.shelf.models["dit"].budgets == {"pruned": 0.6, "dense": None}


async def test_a_leases_step_cache_reaches_the_denoiser(rig: Rig) -> None:
    gateway = await rig.gateway()
    asked = node_pb2.StepCache(
        method="magcache", threshold=0.5, ratios=[1.0, 0.5], max_skip_steps=3, retention=0.25
    )
    await gateway.denoise("cached", step_cache=asked, numerics=FAST)
    await gateway.denoise("plain")
    for request in ("cached", "plain"):
        await gateway.event("done", request)
    cache = StepCache("magcache", 0.5, (1.0, 0.5), 3, 0.25)
    assert rig.shelf.models["dit"].step_caches == {"cached": cache, "plain": None}
    await gateway.denoise("exact", step_cache=asked)
    failed = await gateway.event("failed", "exact")
    assert failed.field == "step_cache"


async def test_who_shares_a_step_is_asked_before_each(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two leases may keep as many tokens at one step and not at the next."""
    gateway = await rig.gateway()
    model = rig.shelf.models["dit"]
    keys = lambda lease: lease.label if lease.step in (2, 3) else "same"  # noqa: E731
    monkeypatch.setattr(model, "batch_key", keys)
    rig.strings.hold()
    for request in "ab":
        await gateway.denoise(request, every=0, numerics=FAST, inputs={"steps": 5})
    await gateway.event("accepted", "b")
    rig.strings.release()
    for request in "ab":
        await gateway.event("done", request)
    # `a` is a step ahead of `b`, so that it parts with it after one step together.
    assert rig.strings.ran == ["a", "a+b", "a", "a", "a+b", "b", "b", "b"]


async def test_a_models_own_counts_are_told_as_they_grow(rig: Rig) -> None:
    model = rig.shelf.models["dit"]
    model.measures = Measures(tokens_seen=100, tokens_kept=60, graphs=2, compile_seconds=1.5)
    model.measures = replace(model.measures, steps_reused=7)
    resident = rig.server.residency.ready_model("dit")
    assert resident is not None
    resident.hold(model)

    def told() -> dict[str, float]:
        text = generate_latest(rig.server.registry).decode()
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if 'model="dit"' in line]
        return {name.removeprefix("kubediffusion_node_"): float(value) for name, value in lines}

    for _ in range(2):  # a scrape counts nothing twice
        found = told()
        assert found['image_tokens_total{model="dit",outcome="kept"}'] == 60
        assert found['image_tokens_total{model="dit",outcome="skipped"}'] == 40
        assert found['compiled_graphs{model="dit"}'] == 2
        assert found['compile_seconds_total{model="dit"}'] == 1.5
        assert found['steps_reused_total{model="dit"}'] == 7
    model.measures = replace(model.measures, tokens_seen=200, tokens_kept=130)
    assert told()['image_tokens_total{model="dit",outcome="skipped"}'] == 70
    await rig.plan(2, [])
    await rig.settled()
    found = told()
    assert 'compiled_graphs{model="dit"}' not in found
    assert found['image_tokens_total{model="dit",outcome="kept"}'] == 130
