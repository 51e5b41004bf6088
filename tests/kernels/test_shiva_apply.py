# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from tiny_backbones import (
    GUIDANCE,
    MAKERS,
    PAIR,
    SIGMAS,
    TOKENS,
    artifact_of,
    call,
    inputs,
    make,
    pruned,
)

from shiva_kernels import (
    KeepMap,
    ShivaConfig,
    Unsupported,
    apply_shiva,
)


@pytest.mark.parametrize("name", MAKERS)
def test_no_budget_is_dense_bit_for_bit_and_so_is_the_removed_handle(name: str) -> None:
    dense = call(make(name), inputs(name, 2))
    transformer, handle = pruned(name, budget=None)
    assert torch.equal(call(transformer, inputs(name, 2)), dense)
    with handle.request(0.6).step(0.5):
        assert not torch.equal(call(transformer, inputs(name, 2)), dense)
    handle.remove()
    assert torch.equal(call(transformer, inputs(name, 2)), dense)
    leftovers = {"forward", "_diffusers_hook"}
    assert not any(leftovers & set(module.__dict__) for module in transformer.modules())


@pytest.mark.parametrize("name", MAKERS)
def test_keeping_every_token_is_dense_bit_for_bit(name: str) -> None:
    dense = call(make(name), inputs(name, 2))
    transformer = make(name)
    artifact = artifact_of(transformer)
    artifact.tables[1.0] = replace(artifact.tables[0.8], budget=1.0)
    apply_shiva(transformer, ShivaConfig(artifact, 1.0, guidance=GUIDANCE[name]))
    assert torch.equal(call(transformer, inputs(name, 2)), dense)


@pytest.mark.parametrize("name", MAKERS)
def test_gathering_all_tokens_and_scattering_them_changes_no_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machinery itself at k = N, not the shortcut around it."""
    rows = 1 if name == "flux" else 2  # Flux runs the images of a batch one by one
    dense = call(make(name), inputs(name, rows))
    transformer, handle = pruned(name)
    gathered: list[int] = []

    def all_of(scores: torch.Tensor, k: int) -> torch.Tensor:
        gathered.append(k)
        return torch.arange(scores.shape[1]).expand(scores.shape[0], -1)

    monkeypatch.setattr("shiva_kernels.modes.top_k", all_of)
    with handle.request().step(0.5):
        assert torch.equal(call(transformer, inputs(name, rows)), dense)
    assert len(gathered) == handle.block_count - 1


@pytest.mark.parametrize("name", MAKERS)
def test_each_block_keeps_as_many_tokens_as_its_table_says(name: str) -> None:
    """Counted where the work is: at each feed-forward."""
    transformer, handle = pruned(name)
    seen: list[int] = []
    for block in handle.blocks:
        mlp = block.proj_mlp if hasattr(block, "proj_mlp") else block.ff
        mlp.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    for sigma in SIGMAS:
        seen.clear()
        with handle.request(sigmas=SIGMAS).step(sigma):
            call(transformer, inputs(name, 2, sigma))
        expected = list(handle.table(0.6, SIGMAS, TOKENS).row(sigma))
        if name == "flux":  # single blocks see the text too; images run one by one
            rows = [
                [k + (5 if i >= 2 else 0)] * (2 if k < TOKENS else 1)
                for i, k in enumerate(expected)
            ]
            expected = [k for row in rows for k in row]
        assert seen == expected
        assert len(set(expected)) > 1


def test_the_row_is_found_by_the_calls_own_timestep() -> None:
    transformer, handle = pruned("sd3")
    with handle.request(sigmas=SIGMAS).step(0.25):
        told = call(transformer, inputs("sd3", 2, 0.25))
    assert torch.equal(call(transformer, inputs("sd3", 2, 0.25)), told)
    assert handle.table(0.6).row(0.25) != handle.table(0.6).row(1.0)


def test_rows_at_different_timesteps_are_refused() -> None:
    transformer, _ = pruned("sd3")
    arguments = inputs("sd3", 2)
    arguments["timestep"] = torch.tensor([500.0, 400.0])
    with pytest.raises(Unsupported, match="2 timesteps"):
        call(transformer, arguments)


def test_requests_of_two_budgets_interleave() -> None:
    transformer, handle = pruned("sd3")
    few, many = handle.request(0.4), handle.request(0.8)
    with few.step(0.5):
        first = call(transformer, inputs("sd3", 2))
    with many.step(0.5):
        second = call(transformer, inputs("sd3", 2))
        with few.step(0.5):
            assert torch.equal(call(transformer, inputs("sd3", 2)), first)
        assert torch.equal(call(transformer, inputs("sd3", 2)), second)
    assert not torch.equal(first, second)


def test_threads_do_not_see_each_others_requests() -> None:
    transformer, handle = pruned("sd3")
    alone: dict[float | None, torch.Tensor] = {}
    for budget in (None, 0.4, 0.8):
        with handle.request(budget).step(0.5):
            alone[budget] = call(transformer, inputs("sd3", 2))
    wrong: list[float | None] = []
    barrier = threading.Barrier(3)

    def run(budget: float | None) -> None:
        with handle.request(budget).step(0.5):
            barrier.wait()
            for _ in range(5):
                if not torch.equal(call(transformer, inputs("sd3", 2)), alone[budget]):
                    wrong.append(budget)

    threads = [threading.Thread(target=run, args=(budget,)) for budget in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_two_transformers_with_two_budgets() -> None:
    one, first = pruned("sd3", 0.8)
    two, second = pruned("sd3", 0.4)
    a, b = call(one, inputs("sd3", 2)), call(two, inputs("sd3", 2))
    assert not torch.equal(a, b)
    with first.request(0.4).step(0.5):  # says nothing to the other
        assert torch.equal(call(two, inputs("sd3", 2)), b)
        assert torch.equal(call(one, inputs("sd3", 2)), b)
    first.remove()
    assert torch.equal(call(two, inputs("sd3", 2)), b)
    second.remove()


def test_controlnet_residuals_reach_every_token() -> None:
    transformer, handle = pruned("sd3")
    residual = torch.randn(2, TOKENS, 32, generator=torch.Generator().manual_seed(5))
    entered: dict[int, torch.Tensor] = {}
    left: dict[int, torch.Tensor] = {}
    for i, block in enumerate(handle.blocks):
        block.register_forward_hook(_recorder(i, entered, left), with_kwargs=True)
    with handle.request().step(0.5):
        call(
            transformer,
            {**inputs("sd3", 2), "block_controlnet_hidden_states": [residual]},
        )
    for i in range(handle.block_count - 1):
        assert torch.equal(entered[i + 1], left[i] + residual)


def _recorder(i: int, entered: dict[int, torch.Tensor], left: dict[int, torch.Tensor]) -> Any:
    def record(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        entered[i], left[i] = kwargs["hidden_states"], out[1]

    return record


def test_rejected_tokens_pass_a_block_unchanged() -> None:
    maps: list[KeepMap] = []
    transformer, handle = pruned("sd3", on_keep=maps.append)
    entered: dict[int, torch.Tensor] = {}
    left: dict[int, torch.Tensor] = {}
    for i, block in enumerate(handle.blocks):
        block.register_forward_hook(_recorder(i, entered, left), with_kwargs=True)
    call(transformer, inputs("sd3", 2))
    for m in maps:
        changed = (entered[m.block] != left[m.block]).any(dim=-1)
        expected = torch.zeros(TOKENS, dtype=torch.bool)
        expected[m.index[0]] = True
        assert torch.equal(changed, expected.expand(2, -1))


def test_saving_a_pruned_transformer_saves_the_transformer(tmp_path: Path) -> None:
    transformer = make("sd3")
    before = {k: v.clone() for k, v in transformer.state_dict().items()}
    apply_shiva(transformer, ShivaConfig(artifact_of(transformer), 0.6, guidance=PAIR))
    transformer.save_pretrained(tmp_path)
    again = SD3Transformer2DModel.from_pretrained(tmp_path)
    assert again.state_dict().keys() == before.keys()
    assert all(torch.equal(again.state_dict()[k], v) for k, v in before.items())


def test_a_first_block_cache_on_top_sees_all_tokens() -> None:
    """A threshold of 0 never reuses: then the cache changes nothing, as it does without pruning."""
    transformer, handle = pruned("flux")
    alone = call(transformer, inputs("flux", 1))
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with transformer.cache_context("lease"), handle.request().step(0.5):
        call(transformer, inputs("flux", 1, seed=9))
        assert torch.equal(call(transformer, inputs("flux", 1)), alone)
    transformer.disable_cache()
    assert torch.equal(call(transformer, inputs("flux", 1)), alone)


def test_a_cache_that_skips_the_step_skips_its_blocks() -> None:
    maps: list[KeepMap] = []
    transformer, handle = pruned("flux", on_keep=maps.append)
    transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with transformer.cache_context("lease"):
        with handle.request().step(0.5):
            call(transformer, inputs("flux", 1))
        computed = len(maps)
        with handle.request().step(0.25):
            call(transformer, inputs("flux", 1, 0.25))
    assert computed == handle.block_count - 1
    assert len(maps) == computed


def test_a_cache_that_came_first_is_refused() -> None:
    transformer = make("flux")
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with pytest.raises(Unsupported, match="apply_shiva first"):
        apply_shiva(transformer, ShivaConfig(artifact_of(transformer), 0.6))


def test_combinations_that_cannot_be_are_refused_and_say_what_to_do() -> None:
    transformer, handle = pruned("sd3")
    arguments = inputs("sd3", 2)
    artifact = handle.artifact
    with pytest.raises(Unsupported, match="pruned already"):
        apply_shiva(transformer, ShivaConfig(artifact, 0.6))
    with pytest.raises(Unsupported, match=r"0.8, 0.6, 0.4, not 0.5"):
        handle.request(0.5)
    with pytest.raises(Unsupported, match="IP-Adapter"):
        call(transformer, {**arguments, "joint_attention_kwargs": {"ip_hidden_states": [1]}})
    transformer.enable_forward_chunking(2, 1)
    with pytest.raises(Unsupported, match="disable_forward_chunking"):
        call(transformer, arguments)
    transformer.disable_forward_chunking()
    transformer.enable_gradient_checkpointing()
    with pytest.raises(Unsupported, match="disable_gradient_checkpointing"):
        transformer(**arguments)
    assert torch.isfinite(call(transformer, arguments)).all()  # without gradients it is not used
    with pytest.raises(Unsupported, match="cannot be pruned"):
        apply_shiva(torch.nn.Linear(2, 2), ShivaConfig(artifact, 0.6))


def test_an_attention_cache_is_refused() -> None:
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    transformer, _ = pruned("sd3")
    apply_pyramid_attention_broadcast(
        transformer,
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: 500,
        ),
    )
    with pytest.raises(Unsupported, match="attention cache"):
        call(transformer, inputs("sd3", 2))
