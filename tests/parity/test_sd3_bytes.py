# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The families' stages, run one after the other, draw diffusers' pictures to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from setups import SETUPS
from small_pipelines import make_large_controlnet, make_sd3
from stages import InProcess

from benchmarks.reference import Case, Control, Setup, cases, draw


@pytest.mark.parametrize("name", SETUPS)
def test_every_case_is_byte_identical_to_diffusers(
    name: str, setup_of: Callable[[str], Setup]
) -> None:
    setup = setup_of(name)
    ours = InProcess(setup)
    different = [case.name for case in cases(setup) if ours.draw(case) != draw(setup, case)]
    assert not different


def test_a_controlnet_that_borrows_the_position_table_is_exact(tmp_path: Path) -> None:
    make_sd3(tmp_path, version="3.5")
    make_large_controlnet(tmp_path / "large")
    setup = Setup(tmp_path, {"large": tmp_path / "large"})
    ours = InProcess(setup)
    for case in cases(setup):
        assert ours.draw(case) == draw(setup, case), case.name


@pytest.mark.parametrize(
    "scheduler", [{"use_dynamic_shifting": True}, {"stochastic_sampling": True}]
)
def test_other_settings_of_the_sampler_are_exact(
    scheduler: dict[str, bool], tmp_path: Path
) -> None:
    make_sd3(tmp_path, scheduler=scheduler)
    setup = Setup(tmp_path)
    ours = InProcess(setup)
    for case in cases(setup):
        assert ours.draw(case) == draw(setup, case), case.name


@pytest.fixture(scope="module")
def sd3(setup_of: Callable[[str], Setup]) -> InProcess:
    return InProcess(setup_of("sd3-f32"))


def test_interleaved_leases_keep_their_bits(sd3: InProcess) -> None:
    several = [
        Case("plain"),
        Case("lora", loras={"one": 0.8}),
        Case("control", controls={"first": Control(0.7)}),
        Case("other", seed=9, guidance=1.0),
    ]
    alone = [sd3.draw(case) for case in several]
    leases = [sd3.start(case) for case in several]
    while any(lease.step < lease.total_steps for lease in leases):
        for lease in leases:
            if lease.step < lease.total_steps:
                sd3.denoiser.advance([lease])
    assert [sd3.decode(lease) for lease in leases] == alone


@pytest.mark.parametrize("case", [Case("text"), Case("image", strength=0.7, steps=6)])
def test_a_lease_goes_on_exactly_from_any_checkpoint(sd3: InProcess, case: Case) -> None:
    expected = sd3.draw(case)
    _, ports, rest = sd3.prepare(case)
    for stop in range(sd3.denoiser.start(ports, **rest).total_steps + 1):
        first = sd3.denoiser.start(ports, **rest)
        for _ in range(stop):
            sd3.denoiser.advance([first])
        second = sd3.denoiser.start(ports, resume=first.checkpoint(), **rest)
        while second.step < second.total_steps:
            sd3.denoiser.advance([second])
        assert sd3.decode(second) == expected, f"resumed after step {stop}"


def test_a_batch_draws_what_each_draws_alone_but_for_rounding(sd3: InProcess) -> None:
    several = [Case("a"), Case("b", seed=3, guidance=2.0), Case("c", seed=5, steps=4)]
    alone = [sd3.start(case) for case in several]
    together = [sd3.start(case) for case in several]
    assert len({sd3.denoiser.batch_key(lease) for lease in together}) == 1
    for _ in range(4):
        sd3.denoiser.advance(together)
        for lease in alone:
            sd3.denoiser.advance([lease])
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a.latents, b.latents, rtol=1e-3, atol=1e-4)


def test_requests_that_cannot_share_a_forward_have_different_keys(sd3: InProcess) -> None:
    several = [
        Case("plain"),
        Case("lora", loras={"one": 0.8}),
        Case("no guidance", guidance=1.0),
        Case("larger", width=48, height=32),
        Case("control", controls={"first": Control()}),
    ]
    keys = [sd3.denoiser.batch_key(sd3.start(case)) for case in several]
    assert len(set(keys)) == len(keys)


def test_a_preview_is_a_picture(sd3: InProcess) -> None:
    lease = sd3.start(Case("text"))
    sd3.denoiser.advance([lease])
    picture = lease.preview()
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert picture.std() > 0
