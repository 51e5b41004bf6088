# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Pruned requests draw what diffusers' pipeline draws with `apply_shiva` on it, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_artifacts import make_artifact
from setups import SETUPS
from stages import InProcess

from benchmarks.exact import through_the_service
from benchmarks.reference import Case, Control, Setup, draw, inputs
from kubediffusion.client.core import build_request
from kubediffusion.errors import InvalidInput
from kubediffusion.local.runtime import LocalRuntime
from shiva_kernels import Artifact
from shiva_kernels.tables import build_table

CASES = [
    Case("the workflow's budget"),
    Case("another budget", budget=0.4, seed=11, negative_prompt="a green square"),
    Case("all tokens", budget=1.0),
    Case("without guidance", budget=0.8, guidance=1.0),
    Case("image to image", budget=0.4, strength=0.6, steps=6),
    Case("a ControlNet", budget=0.6, controls={"first": Control(0.7, 0.0, 0.8)}),
    Case("a LoRA", budget=0.4, loras={"one": 0.9}),
    Case("another size", budget=0.6, width=48, height=32),
]


@pytest.fixture(scope="session")
def pruned_of(setup_of: Callable[[str], Setup]) -> Callable[[str], Setup]:
    """`setup_of` with a random artifact, at budget 0.6 where a request names none."""

    def make(name: str) -> Setup:
        setup = setup_of(name)
        folder = setup.path / "artifact"
        if not folder.exists():
            make_artifact(setup.path, folder)
        return replace(setup, pruning=folder, budget=0.6)

    return make


@pytest.fixture(scope="module")
def pruned(pruned_of: Callable[[str], Setup]) -> InProcess:
    return InProcess(pruned_of("sd3-no-t5"))


@pytest.mark.usefixtures("fork_server")
async def test_pictures_through_the_service_equal_the_pruned_pipelines(
    pruned_of: Callable[[str], Setup], tmp_path: Path
) -> None:
    """Beside them the same weights without the artifact: the own dense model."""
    setup = pruned_of("sd3-no-t5")
    dense = replace(setup, pruning=None)
    setups = {"pruned": setup, "dense": dense}
    ours = await through_the_service(setups, {"pruned": CASES, "dense": CASES[:1]}, tmp_path)
    different = [case.name for case in CASES if ours["pruned", case.name] != draw(setup, case)]
    assert not different
    assert ours["dense", CASES[0].name] == draw(dense, CASES[0])
    assert len({ours["pruned", case.name] for case in CASES}) == len(CASES)
    # The artifact's dense model is not the own one: its adapter is merged.
    assert draw(setup, replace(CASES[0], budget=1.0)) != ours["dense", CASES[0].name]


@pytest.mark.parametrize("name", [name for name in SETUPS if name != "sd3-no-t5"])
def test_versions_and_dtypes_are_exact(name: str, pruned_of: Callable[[str], Setup]) -> None:
    setup = pruned_of(name)
    ours = InProcess(setup)
    for case in (CASES[0], CASES[4]):
        assert ours.draw(case) == draw(setup, case), case.name


def test_leases_of_several_budgets_interleave_with_the_bits_of_each_alone(
    pruned: InProcess,
) -> None:
    several = [CASES[0], replace(CASES[0], budget=0.4), replace(CASES[0], budget=1.0), CASES[6]]
    alone = [pruned.draw(case) for case in several]
    leases = [pruned.start(case) for case in several]
    while any(lease.step < lease.total_steps for lease in leases):
        for lease in leases:
            if lease.step < lease.total_steps:
                pruned.denoiser.advance([lease])
    assert [pruned.decode(lease) for lease in leases] == alone


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=lambda case: case.name)
def test_a_pruned_lease_goes_on_exactly_from_any_checkpoint(pruned: InProcess, case: Case) -> None:
    expected = pruned.draw(case)
    _, ports, rest = pruned.prepare(case)
    rest |= {"budget": case.budget}
    for stop in range(pruned.denoiser.start(ports, **rest).total_steps + 1):
        first = pruned.denoiser.start(ports, **rest)
        for _ in range(stop):
            pruned.denoiser.advance([first])
        second = pruned.denoiser.start(ports, resume=first.checkpoint(), **rest)
        while second.step < second.total_steps:
            pruned.denoiser.advance([second])
        assert pruned.decode(second) == expected, f"resumed after step {stop}"


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[7]], ids=lambda case: case.name)
def test_each_block_computes_as_many_tokens_as_the_table_says(
    pruned: InProcess, case: Case, pruned_of: Callable[[str], Setup]
) -> None:
    """Counted at each feed-forward, at every step, of the table for this request's own grid."""
    lease = pruned.start(case)
    artifact = Artifact.load(pruned_of("sd3-no-t5").pruning or "")
    tokens = (case.width or 32) * (case.height or 32) // 16
    curve = artifact.tables[case.budget or 0].curve
    table = build_table(curve, case.budget or 0, lease.sigmas, tokens, None)
    seen: list[int] = []
    handles = [
        block.ff.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
        for block in pruned.denoiser._module.transformer_blocks
    ]
    measured = pruned.denoiser.measures
    try:
        counted = []
        while lease.step < lease.total_steps:
            seen.clear()
            pruned.denoiser.advance([lease])
            counted.append(tuple(seen))
    finally:
        for handle in handles:
            handle.remove()
    # Of image to image these are the grid's last rows.
    assert counted == list(table.k[-lease.total_steps :])
    assert len(set(counted)) > 1
    new = pruned.denoiser.measures
    assert new.tokens_kept - measured.tokens_kept == sum(sum(row[1:]) for row in counted)
    assert new.tokens_seen - measured.tokens_seen == tokens * sum(len(r) - 1 for r in counted)


def test_leases_share_a_step_where_they_keep_as_many_tokens_and_only_there(
    pruned: InProcess,
) -> None:
    def start(**options: object) -> object:
        return pruned.start(replace(CASES[0], **options))

    a, b = start(seed=1), start(seed=2, guidance=2.0)
    others = [start(budget=0.4), start(budget=1.0), start(guidance=1.0)]
    key = pruned.denoiser.batch_key
    assert key(a) == key(b)
    assert len({key(each) for each in (a, *others)}) == 4
    alone = [start(seed=1), start(seed=2, guidance=2.0)]
    for _ in range(2):
        pruned.denoiser.advance([a, b])
        for each in alone:
            pruned.denoiser.advance([each])
    for together, single in zip((a, b), alone, strict=True):
        torch.testing.assert_close(together.latents, single.latents, rtol=1e-3, atol=1e-4)
    late = start(seed=1)
    assert key(late) != key(a)  # the same budget at another step


@pytest.mark.usefixtures("fork_server")
async def test_a_budget_that_cannot_be_is_refused_and_says_which_can(
    pruned_of: Callable[[str], Setup],
) -> None:
    from benchmarks.reference import workflow as written
    from kubediffusion import api, workflow
    from kubediffusion.sources import read_index

    setup = pruned_of("sd3-no-t5")
    definition = api.load_workflow(written(setup, "pruned"))
    resolved = workflow.resolve(definition, read_index(f"file://{setup.path}"))
    async with LocalRuntime(workflows=[resolved]) as runtime:
        await runtime.ready()
        (info,) = runtime.gateway.list_workflows()
        assert (list(info.budgets), info.budget) == ([1.0, 0.8, 0.6, 0.4], 0.6)

        async def ask(budget: float) -> None:
            request = build_request("pruned", "", inputs=inputs(CASES[0]), budget=budget)
            async for _ in runtime.generate(request):
                pass

        with pytest.raises(InvalidInput, match=r"1, 0\.8, 0\.6, 0\.4 can be asked for") as info:
            await ask(0.5)
        assert info.value.field == "budget"
        with pytest.raises(InvalidInput, match="above 0, at most 1"):
            await ask(1.5)
