# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What the rows of a call are: pairs, images, or calls that follow one another."""

from __future__ import annotations

import pytest
import torch
from tiny_backbones import SIGMAS, TOKENS, call, inputs, pruned

from shiva_kernels import Guidance, KeepMap, PairScore, Unsupported


def test_both_branches_of_a_pair_keep_the_same_tokens() -> None:
    maps: list[KeepMap] = []
    transformer, _ = pruned("sd3", on_keep=maps.append)
    call(transformer, inputs("sd3", 4))
    assert {m.block for m in maps} == {1, 2, 3, 4}
    assert all(m.index.shape[0] == 2 and m.tokens == TOKENS for m in maps)
    assert all(torch.equal(m.index, m.index.sort(dim=1).values) for m in maps)


@pytest.mark.parametrize("how", list(PairScore))
def test_the_three_scores_of_a_pair_select_differently(how: PairScore) -> None:
    maps: dict[PairScore, list[torch.Tensor]] = {}
    for one in PairScore:
        found: list[KeepMap] = []
        transformer, _ = pruned("sd3", pair_score=one, on_keep=found.append)
        call(transformer, inputs("sd3", 2))
        maps[one] = [m.index for m in found]
    others = [maps[one] for one in PairScore if one is not how]
    assert all(
        any(not torch.equal(a, b) for a, b in zip(maps[how], other, strict=True))
        for other in others
    )


def test_later_calls_of_a_step_reuse_the_firsts_selection() -> None:
    """Sequential guidance: the conditional call selects, the unconditional one follows."""
    maps: list[KeepMap] = []
    transformer, handle = pruned("flux", guidance=Guidance.SEQUENTIAL, on_keep=maps.append)
    cond, uncond = inputs("flux", 1, seed=1), inputs("flux", 1, seed=2)
    with handle.request().steps():
        call(transformer, cond)
        call(transformer, uncond)
        first, second = maps[:4], maps[4:]
        assert all(torch.equal(a.index, b.index) for a, b in zip(first, second, strict=True))
        later = inputs("flux", 1, sigma=0.25, seed=2)
        call(transformer, later)
    with handle.request().step(0.25):
        call(transformer, later)
    # A new sigma selected anew: as it does alone.
    for a, b in zip(maps[8:12], maps[12:], strict=True):
        assert torch.equal(a.index, b.index)


def test_a_third_call_for_skip_layer_guidance_follows_the_pair() -> None:
    maps: list[KeepMap] = []
    transformer, handle = pruned("sd3", on_keep=maps.append)
    third = {k: v[1:] if isinstance(v, torch.Tensor) else v for k, v in inputs("sd3", 2).items()}
    with handle.request().step(0.5):
        call(transformer, inputs("sd3", 2))
        call(transformer, {**third, "skip_layers": [2]})
    first, later = {m.block: m.index for m in maps[:4]}, maps[4:]
    assert [m.block for m in later] == [1, 3, 4]
    assert all(torch.equal(first[m.block], m.index) for m in later)
    with pytest.raises(Unsupported, match=r"handle\.request"):
        call(transformer, {**third, "skip_layers": [2]})


def test_a_third_call_follows_the_pair_of_a_followed_pipeline() -> None:
    class Pipeline:
        do_classifier_free_guidance = True

    maps: list[KeepMap] = []
    transformer, handle = pruned("sd3", guidance=None, pipeline=Pipeline(), on_keep=maps.append)
    third = {k: v[1:] if isinstance(v, torch.Tensor) else v for k, v in inputs("sd3", 2).items()}
    with handle.request().steps():
        call(transformer, inputs("sd3", 2))
        call(transformer, {**third, "skip_layers": [2]})
    first = {m.block: m.index for m in maps[:4]}
    assert all(torch.equal(first[m.block], m.index) for m in maps[4:])
    assert len(maps) == 7


def test_a_pipelines_second_call_without_a_request_is_refused() -> None:
    transformer, handle = pruned("flux")
    with (
        transformer.cache_context("uncond"),
        pytest.raises(Unsupported, match="several times a step"),
    ):
        call(transformer, inputs("flux", 1))
    with (
        handle.request().steps(),
        transformer.cache_context("uncond"),
        pytest.raises(Unsupported, match="SEQUENTIAL"),
    ):
        call(transformer, inputs("flux", 1))


def test_a_batch_that_could_be_pairs_or_images_is_refused() -> None:
    transformer, _ = pruned("sd3", guidance=None)
    with pytest.raises(Unsupported, match="pairs or images"):
        call(transformer, inputs("sd3", 2))
    assert call(transformer, inputs("sd3", 1)).shape[0] == 1


def test_a_pipeline_is_followed_in_guidance_and_grid() -> None:
    class Scheduler:
        timesteps = torch.tensor([1000.0, 750.0, 500.0, 250.0])
        config = type("config", (), {"num_train_timesteps": 1000})

    class Pipeline:
        do_classifier_free_guidance = True
        scheduler = Scheduler()

    maps: list[KeepMap] = []
    pipe = Pipeline()
    transformer, handle = pruned("sd3", guidance=None, pipeline=pipe, on_keep=maps.append)
    call(transformer, inputs("sd3", 2))
    assert all(m.index.shape[0] == 1 for m in maps)
    row = handle.table(0.6, (1.0, 0.75, 0.5, 0.25), TOKENS).row(0.5)
    assert [m.index.shape[1] for m in maps] == list(row[1:])
    maps.clear()
    pipe.do_classifier_free_guidance = False
    call(transformer, inputs("sd3", 2))
    assert all(m.index.shape[0] == 2 for m in maps)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_an_image_does_not_depend_on_its_batch_mates(name: str) -> None:
    transformer, handle = pruned(name, guidance=Guidance.NONE)
    maps: list[KeepMap] = []
    request = handle.request(on_keep=maps.append)
    both = inputs(name, 2)
    with request.step(0.5):
        together = call(transformer, both)
    kept = [m.index for m in maps]
    for row in range(2):
        maps.clear()
        alone = {
            k: v[row : row + 1] if isinstance(v, torch.Tensor) and "ids" not in k else v
            for k, v in both.items()
        }
        with request.step(0.5):
            assert torch.allclose(call(transformer, alone)[0], together[row], atol=1e-5)
        assert all(torch.equal(m.index[0], k[row]) for m, k in zip(maps, kept, strict=True))


def test_requests_share_a_call_at_the_same_row_only() -> None:
    transformer, handle = pruned("sd3")
    mine: list[KeepMap] = []
    theirs: list[KeepMap] = []
    a = handle.request(0.6, sigmas=SIGMAS, on_keep=mine.append)
    b = handle.request(0.6, sigmas=SIGMAS, on_keep=theirs.append)
    four = inputs("sd3", 4)
    with handle.together([(a, 0.5), (b, 0.5)]):
        together = call(transformer, four)
    for i, (request, maps) in enumerate(((a, mine), (b, theirs))):
        got = [m.index for m in maps]
        maps.clear()
        alone = {
            k: torch.stack([v[i], v[i + 2]]) if isinstance(v, torch.Tensor) else v
            for k, v in four.items()
        }
        with request.step(0.5):
            assert torch.allclose(call(transformer, alone), together[i::2], atol=1e-5)
        assert all(torch.equal(x, m.index) for x, m in zip(got, maps, strict=True))
    assert a.row(0.5, TOKENS) == b.row(0.5, TOKENS) != b.row(1.0, TOKENS)
    with (
        handle.together([(a, 0.5), (b, 1.0)]),
        pytest.raises(Unsupported, match="same row"),
    ):
        call(transformer, four)
