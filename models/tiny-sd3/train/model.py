# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The transformer, its position table for each picture size, and the network that is trained."""

from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional

from train.common import CHANNELS, PATCH, PIXELS, VAE_FACTOR
from train.reading import PlaceReader
from train.text import CONTEXT_WIDTH, Context, TextEncoders
from train.world import CLASSES

WIDTH, HEADS, BLOCKS = 128, 4, 8
TABLE_SIDE = 16  # tokens a side at 256 pixels
AUX_BLOCK = 4
CELLS_PER_TOKEN = PATCH * PATCH


class WeightedJointAttention:
    """SD3's joint attention, in which the last `shared` tokens have `logit` added to their logits.

    For training only: it stands for many equal pad tokens. The shipped model uses diffusers' own.
    """

    def __init__(self) -> None:
        self.shared, self.logit = 0, 0.0

    def set(self, context: Context) -> None:
        """Take the weights of the next forward pass."""
        self.shared, self.logit = context.shared, context.logit

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        del attention_mask
        image, text = hidden_states, encoder_hidden_states
        query, key, value = (
            torch.cat([norm_x(_heads(to_x(image), attn)), norm_c(_heads(to_c(text), attn))], 2)
            for to_x, to_c, norm_x, norm_c in (
                (attn.to_q, attn.add_q_proj, attn.norm_q, attn.norm_added_q),
                (attn.to_k, attn.add_k_proj, attn.norm_k, attn.norm_added_k),
                (attn.to_v, attn.add_v_proj, nn.Identity(), nn.Identity()),
            )
        )
        out = self._attend(query, key, value).transpose(1, 2).flatten(2).to(image.dtype)
        painted, read = out[:, : image.shape[1]], out[:, image.shape[1] :]
        return attn.to_out[0](painted), read if attn.context_pre_only else attn.to_add_out(read)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Written out: the fused kernel's backward pass is several times slower on a CPU."""
        batch, _, length, size = query.shape
        bias = query.new_zeros(length)
        bias[length - self.shared :] = self.logit
        query, key, value = ((x.flatten(0, 1)) for x in (query * size**-0.5, key, value))
        weights = torch.baddbmm(bias, query, key.mT).softmax(-1).to(value.dtype)
        return torch.bmm(weights, value).unflatten(0, (batch, -1))


def _heads(tensor: torch.Tensor, attn: Attention) -> torch.Tensor:
    return tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def make_transformer() -> SD3Transformer2DModel:
    """The architecture, with blocks that start as the identity (adaLN-zero)."""
    transformer = SD3Transformer2DModel(
        sample_size=PIXELS // VAE_FACTOR,
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=BLOCKS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=CONTEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=CONTEXT_WIDTH,
        pos_embed_max_size=TABLE_SIDE,
        qk_norm="rms_norm",
    )
    zeroed = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    for layer in zeroed:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def set_positions(transformer: SD3Transformer2DModel, pixels: int) -> None:
    """Lay the position table over the whole picture at this size.

    SD3 crops the middle of its 16 x 16 table for smaller pictures. Filling that middle with the
    table averaged over 2 x 2 tokens makes a token at 128 pixels mean the same spot of the picture
    as the four at 256, so that what is learnt at 128 carries over.
    """
    fresh = make_transformer().pos_embed.pos_embed
    table = fresh.reshape(TABLE_SIDE, TABLE_SIDE, WIDTH).clone()
    side = pixels // VAE_FACTOR // PATCH
    if side < TABLE_SIDE:
        coarse = functional.avg_pool2d(table.permute(2, 0, 1), TABLE_SIDE // side).permute(1, 2, 0)
        start = (TABLE_SIDE - side) // 2
        table[start : start + side, start : start + side] = coarse
    transformer.pos_embed.pos_embed.copy_(table.reshape(1, -1, WIDTH))


class FlowNet(nn.Module):
    """Everything that flow matching trains, and two heads that are thrown away afterwards.

    `head` names what each latent cell shows (an object's colour and shape, or a background) from
    the middle of the transformer: a direct signal about the caption that the velocity lacks.
    """

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.text = TextEncoders(work / "tokenizers")
        for clip in (self.text.clip_1, self.text.clip_2):
            clip.set_attn_implementation("eager")  # see WeightedJointAttention._attend
        self.transformer = make_transformer()
        self.attention = WeightedJointAttention()
        self.transformer.set_attn_processor(self.attention)
        self.head = nn.Sequential(
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, CELLS_PER_TOKEN * CLASSES),
        )
        self.reader = PlaceReader()
        self._middle: list[torch.Tensor] = []
        block = self.transformer.transformer_blocks[AUX_BLOCK - 1]
        block.register_forward_hook(lambda _m, _i, out: self._middle.append(out[1]))

    def velocity(
        self, noisy: torch.Tensor, time: torch.Tensor, context: Context, **options: Any
    ) -> torch.Tensor:
        """The transformer's answer; time runs from 0 (data) to 1 (noise)."""
        self._middle.clear()
        self.attention.set(context)
        out: torch.Tensor = self.transformer(
            hidden_states=noisy,
            timestep=time * 1000,
            encoder_hidden_states=context.tokens,
            pooled_projections=context.pooled,
            return_dict=False,
            **options,
        )[0]
        return out

    def class_logits(self, side: int) -> torch.Tensor:
        """What the last forward pass saw in each latent cell, (n, cells, cells, classes)."""
        logits = self.head(self._middle[0]).unflatten(1, (side // PATCH, side // PATCH))
        logits = logits.unflatten(-1, (PATCH, PATCH, CLASSES)).permute(0, 1, 3, 2, 4, 5)
        return logits.flatten(1, 2).flatten(2, 3)
