# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Leases with a step cache: diffusers' pictures with MagCache on, and nothing of it for others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.hooks import MagCacheConfig, apply_mag_cache
from random_artifacts import make_artifact
from stages import InProcess

from benchmarks.reference import Case, Control, Setup, draw
from kubediffusion.errors import InvalidInput
from kubediffusion.models.base import StepCache
from kubediffusion.workflow import StepCache as Asked
from kubediffusion.workflow import computed_share

STEPS = 8
CACHE = StepCache("magcache", 0.05, (1.0, 0.99, 0.985, 0.98, 0.99), 2, 0.2)
DENSE = Case("all tokens", steps=STEPS, budget=1.0)
PRUNED = Case("pruned", steps=STEPS, budget=0.6, seed=3)
LORA = replace(DENSE, name="a LoRA", loras={"one": 0.9})
CONTROLLED = replace(DENSE, name="a ControlNet", controls={"first": Control(0.7)})


@pytest.fixture(scope="module")
def setup(setup_of: Callable[[str], Setup]) -> Setup:
    made = setup_of("sd3-no-t5")
    folder = made.path / "artifact"
    if not folder.exists():
        make_artifact(made.path, folder)
    return replace(made, pruning=folder, budget=0.6)


@pytest.fixture(scope="module")
def ours(setup: Setup) -> InProcess:
    return InProcess(setup)


def start(ours: InProcess, case: Case, cache: StepCache | None = CACHE, **more: Any) -> Any:
    _, given, rest = ours.prepare(case)
    return ours.denoiser.start(given, budget=ours.budget(case), step_cache=cache, **rest, **more)


def finished(ours: InProcess, lease: Any) -> bytes:
    while lease.step < lease.total_steps:
        ours.denoiser.advance([lease])
    return ours.decode(lease)


def drawn(ours: InProcess, case: Case, cache: StepCache | None = CACHE) -> bytes:
    return finished(ours, start(ours, case, cache))


def with_magcache(pipe: Any) -> None:
    config = MagCacheConfig(
        threshold=CACHE.threshold,
        max_skip_steps=CACHE.max_skip_steps,
        retention_ratio=CACHE.retention,
        num_inference_steps=STEPS,
        mag_ratios=torch.tensor(CACHE.ratios),
    )
    apply_mag_cache(pipe.transformer, config)


@pytest.mark.parametrize("case", [DENSE, PRUNED, LORA], ids=lambda case: case.name)
def test_the_picture_is_that_of_diffusers_with_magcache(
    ours: InProcess, setup: Setup, case: Case
) -> None:
    picture = drawn(ours, case)
    assert picture == draw(setup, case, with_magcache)
    assert picture != drawn(ours, case, None)


def test_leases_interleave_with_the_bits_of_each_alone(ours: InProcess) -> None:
    """With other settings, other numbers of steps, pruned, and without a cache among them."""
    several = [
        (DENSE, CACHE),
        (replace(DENSE, seed=9), CACHE),
        (DENSE, None),
        (PRUNED, CACHE),
        (replace(DENSE, steps=5), replace(CACHE, threshold=1.0, max_skip_steps=9)),
        (LORA, CACHE),
        (CONTROLLED, CACHE),
    ]
    alone = [drawn(ours, case, cache) for case, cache in several]
    leases = [start(ours, case, cache) for case, cache in several]
    while any(lease.step < lease.total_steps for lease in leases):
        for lease in leases:
            if lease.step < lease.total_steps:
                ours.denoiser.advance([lease])
    assert [ours.decode(lease) for lease in leases] == alone
    assert len(set(alone)) == len(alone)


def test_who_asks_for_none_has_the_bits_of_the_module(ours: InProcess, setup: Setup) -> None:
    drawn(ours, DENSE)
    assert drawn(ours, DENSE, None) == draw(setup, DENSE)
    assert drawn(ours, PRUNED, None) == draw(setup, PRUNED)
    names = {
        name
        for module in ours.denoiser._module.modules()
        for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", ())
    }
    assert all(name.startswith("shiva") for name in names)


def test_reused_steps_are_counted_and_foretold(ours: InProcess) -> None:
    asked = Asked("magcache", CACHE.threshold, CACHE.ratios, CACHE.max_skip_steps, CACHE.retention)
    for steps in (2, 5, STEPS, 30):
        before = ours.denoiser.measures
        drawn(ours, replace(PRUNED, steps=steps))
        after = ours.denoiser.measures
        reused = after.steps_reused - before.steps_reused
        assert reused == pytest.approx(steps * (1 - computed_share(asked, steps)))
        # Its blocks kept no token at those steps.
        share = (after.tokens_kept - before.tokens_kept) / (after.tokens_seen - before.tokens_seen)
        assert share < 0.62 * (steps - reused) / steps + 0.1
    assert reused > 10
    assert computed_share(None, 8) == 1.0


def test_no_controlnet_runs_at_a_step_that_reuses(ours: InProcess) -> None:
    """What is reused has its residuals in it already: diffusers would add them a second time."""
    calls: list[int] = []
    net: Any = ours.models["controlnet.first"]
    watch = net.module.register_forward_hook(lambda *_: calls.append(1))
    before = ours.denoiser.measures.steps_reused
    try:
        drawn(ours, CONTROLLED)
    finally:
        watch.remove()
    assert len(calls) == STEPS - (ours.denoiser.measures.steps_reused - before) < STEPS
    silent = replace(CONTROLLED, controls={"first": Control(0.0)})
    assert drawn(ours, silent) == drawn(ours, DENSE)
    # A cache that may never reuse changes nothing.
    whole = replace(CACHE, retention=1.0)
    assert drawn(ours, CONTROLLED, whole) == drawn(ours, CONTROLLED, None)


def test_a_resumed_lease_begins_an_empty_cache_and_says_so(ours: InProcess) -> None:
    first = start(ours, DENSE)
    for _ in range(4):
        ours.denoiser.advance([first])
    assert first.step_cache.reuses  # so the next would have something to reuse
    state = first.checkpoint()
    assert set(state.tensors) == {"latents", "generator"}
    second = start(ours, DENSE, resume=state)
    ours.denoiser.advance([second])
    assert not second.step_cache.reuses
    finished(ours, second)
    (warning,) = second.finish()["warnings"]
    assert "after step 4" in warning
    assert "warnings" not in start_to_end(ours)


def start_to_end(ours: InProcess) -> Any:
    lease = start(ours, DENSE)
    finished(ours, lease)
    return lease.finish()


def test_image_to_image_is_at_its_place_of_the_grid(ours: InProcess) -> None:
    """The first half of the grid never reuses, and this request begins behind it."""
    early = replace(CACHE, retention=0.5)
    lease = start(ours, replace(DENSE, strength=0.5), early)
    reuses: list[bool] = []
    while lease.step < lease.total_steps:
        ours.denoiser.advance([lease])
        reuses.append(lease.step_cache.reuses)
    assert reuses == [False, True, False, True]


def test_what_is_cached_goes_with_its_lease(ours: InProcess) -> None:
    lease = start(ours, DENSE)
    for _ in range(3):
        ours.denoiser.advance([lease])
    kept = weakref.ref(lease.step_cache.states.get_state().previous_residual)
    assert kept() is not None
    del lease
    gc.collect()
    assert kept() is None


def test_such_a_lease_goes_alone(ours: InProcess) -> None:
    key = ours.denoiser.batch_key
    a, b = start(ours, DENSE), start(ours, DENSE)
    assert key(a) == key(a) != key(b)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(CACHE, method="first-block"),
        replace(CACHE, ratios=()),
        replace(CACHE, threshold=0.0),
    ],
)
def test_what_cannot_be_is_refused(ours: InProcess, wrong: StepCache) -> None:
    with pytest.raises(InvalidInput) as info:
        start(ours, DENSE, wrong)
    assert info.value.field == "step_cache"
