# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Each backbone against a forward written out by hand: gather, block, scatter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_backbones import PAIR, TEXT, TOKENS, artifact_of, call, inputs, make

from shiva_kernels import Conditions, Guidance, ShivaConfig, TrainingPlan, apply_shiva

K = 20


def scores_of(block: int, rows: int) -> torch.Tensor:
    """Fixed scores, others in each block and each row."""
    return torch.randn(rows, TOKENS, generator=torch.Generator().manual_seed(block))


def scorer(block: int, x: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    return scores_of(block, x.shape[0])


def index_of(block: int, rows: int) -> torch.Tensor:
    return scores_of(block, rows).topk(K, dim=1).indices.sort(dim=1).values


def through(
    blocks: list[Any], x: torch.Tensor, run: Callable[[int, Any, torch.Tensor, Any], torch.Tensor]
) -> torch.Tensor:
    """Block 0 on all tokens, the others on the rows of `index_of`, image by image."""
    x = run(0, blocks[0], x, None)
    for i, block in enumerate(blocks[1:], 1):
        index = index_of(i, x.shape[0])
        kept = torch.stack([row[chosen] for row, chosen in zip(x, index, strict=True)])
        y = run(i, block, kept, index)
        x = x.clone()
        for row in range(x.shape[0]):
            x[row, index[row]] = y[row]
    return x


def sd3_by_hand(t: Any, a: dict[str, Any]) -> torch.Tensor:
    temb = t.time_text_embed(a["timestep"], a["pooled_projections"])
    text = t.context_embedder(a["encoder_hidden_states"])

    def run(i: int, block: Any, x: torch.Tensor, index: Any) -> torch.Tensor:
        nonlocal text
        text, y = block(hidden_states=x, encoder_hidden_states=text, temb=temb)
        return y

    x = through(list(t.transformer_blocks), t.pos_embed(a["hidden_states"]), run)
    x = t.proj_out(t.norm_out(x, temb))
    rows, side, channels = x.shape[0], int(TOKENS**0.5), t.out_channels
    x = x.reshape(rows, side, side, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(rows, channels, 2 * side, 2 * side)


def flux_by_hand(t: Any, a: dict[str, Any]) -> torch.Tensor:
    temb = t.time_text_embed(a["timestep"] * 1000, a["pooled_projections"])
    text = t.context_embedder(a["encoder_hidden_states"])
    cos, sin = t.pos_embed(torch.cat([a["txt_ids"], a["img_ids"]]))

    def run(i: int, block: Any, x: torch.Tensor, index: Any) -> torch.Tensor:
        nonlocal text
        texts, ys = [], []
        for row in range(x.shape[0]):
            chosen = torch.arange(TOKENS) if index is None else index[row]
            rows = torch.cat([torch.arange(TEXT), TEXT + chosen])
            one_text, y = block(
                hidden_states=x[row : row + 1],
                encoder_hidden_states=text[row : row + 1],
                temb=temb[row : row + 1],
                image_rotary_emb=(cos[rows], sin[rows]),
            )
            texts.append(one_text)
            ys.append(y)
        text = torch.cat(texts)
        return torch.cat(ys)

    blocks = [*t.transformer_blocks, *t.single_transformer_blocks]
    return t.proj_out(t.norm_out(through(blocks, t.x_embedder(a["hidden_states"]), run), temb))


def pixart_by_hand(t: Any, a: dict[str, Any]) -> torch.Tensor:
    rows = a["hidden_states"].shape[0]
    x = t.pos_embed(a["hidden_states"])
    time, embedded = t.adaln_single(
        a["timestep"], a["added_cond_kwargs"], batch_size=rows, hidden_dtype=x.dtype
    )
    text = t.caption_projection(a["encoder_hidden_states"])

    def run(i: int, block: Any, x: torch.Tensor, index: Any) -> torch.Tensor:
        return block(x, encoder_hidden_states=text, timestep=time)

    x = through(list(t.transformer_blocks), x, run)
    shift, scale = (t.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
    x = t.proj_out(t.norm_out(x) * (1 + scale) + shift)
    side, channels = int(TOKENS**0.5), t.out_channels
    x = x.reshape(rows, side, side, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(rows, channels, 2 * side, 2 * side)


BY_HAND = {
    "sd3": sd3_by_hand,
    "sd35": sd3_by_hand,
    "flux": flux_by_hand,
    "pixart": pixart_by_hand,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_pruned_forward_is_gather_block_scatter(name: str) -> None:
    arguments = inputs(name, 2)
    with torch.no_grad():
        expected = BY_HAND[name](make(name), arguments)
    transformer = make(name)
    handle = apply_shiva(transformer, ShivaConfig(artifact_of(transformer), None))
    with handle.training(TrainingPlan(k=[K] * (handle.block_count - 1), scorer=scorer)):
        out = call(transformer, arguments)
    assert torch.allclose(out, expected, atol=1e-5)
    assert not torch.allclose(out, call(transformer, arguments), atol=1e-3)


def test_rotary_positions_follow_their_tokens() -> None:
    """The by-hand forward of Flux with the rows of the first k positions is another result."""
    arguments = inputs("flux", 1)
    transformer = make("flux")
    handle = apply_shiva(transformer, ShivaConfig(artifact_of(transformer), None))
    plan = TrainingPlan(k=[K] * (handle.block_count - 1), scorer=scorer)
    with handle.training(plan):
        right = call(transformer, arguments)
    moved = {**arguments, "img_ids": arguments["img_ids"].roll(7, dims=0)}
    with handle.training(plan):
        assert not torch.allclose(call(transformer, moved), right, atol=1e-4)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_router_sees_the_backbones_own_time_and_text(name: str) -> None:
    seen: list[Conditions] = []

    def watch(block: int, x: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        seen.append(conditions)
        return scores_of(block, x.shape[0])

    transformer = make(name)
    handle = apply_shiva(transformer, ShivaConfig(artifact_of(transformer), 0.6))
    arguments = inputs(name, 2)
    with handle.request(guidance=PAIR, scorer=watch).step(0.5):
        call(transformer, arguments)
    embed = transformer.adaln_single.emb if name == "pixart" else transformer.time_text_embed
    scale = 1000 if name == "flux" else 1
    with torch.no_grad():
        time = embed.timestep_embedder(embed.time_proj(arguments["timestep"] * scale))
    assert all(torch.equal(c.time, time) for c in seen)
    if name == "pixart":
        assert torch.allclose(seen[0].pooled, arguments["encoder_hidden_states"].mean(dim=1))
    else:
        assert seen[0].pooled is arguments["pooled_projections"]


def test_pixart_leaves_padding_out_of_its_pooled_text() -> None:
    seen: list[Conditions] = []

    def watch(block: int, x: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        seen.append(conditions)
        return scores_of(block, x.shape[0])

    transformer = make("pixart")
    handle = apply_shiva(transformer, ShivaConfig(artifact_of(transformer), 0.6))
    arguments = inputs("pixart", 1)
    arguments["encoder_attention_mask"] = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]])
    with handle.request(guidance=Guidance.NONE, scorer=watch).step(0.5):
        call(transformer, arguments)
    assert torch.allclose(seen[0].pooled, arguments["encoder_hidden_states"][:, :2].mean(dim=1))
