# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Small Stable Diffusion 3 and 3.5 pipelines with random weights, made on the spot.

Nothing is fetched: tokenizers are built here, weights are drawn from a seed. Every dimension is a
few dozen, so that a whole generation takes a fraction of a second on one core, yet every part of
the architecture is there: three text encoders, joint blocks, ControlNets, LoRAs on all of them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = ("a", "red", "blue", "green", "circle", "square", "above", "below", "left", "of", "and")
T5_WIDTH = 96  # wider than both CLIPs together, so that their embeddings get padded
CLIP_WIDTHS = (32, 48)
HEADS, HEAD_DIM = 2, 16

_TRANSFORMER_LORA = ("to_q", "to_v", "add_k_proj", "to_out.0", "proj_out")
_TEXT_LORA = ("q_proj", "v_proj", "out_proj")


def make_sd3(
    path: Path | str,
    *,
    version: str = "3",
    t5: bool = True,
    seed: int = 0,
    controlnets: int = 0,
    loras: int = 0,
    scheduler: dict[str, Any] | None = None,
) -> None:
    """Writes a pipeline in diffusers' layout to `path`; images are 32×32 by default.

    `version` "3.5" has dual attention layers and RMS-normalised queries and keys. ControlNets go
    to the folders ``controlnet_0``, ``controlnet_1``, … beside the pipeline's parts: even ones
    like SD3's (zero pooled projections, no shift), odd ones not. LoRAs go to ``lora_0``, …: even
    ones change the CLIPs too, odd ones the transformer alone. `scheduler` overrides its config.
    """
    if version not in ("3", "3.5"):
        raise ValueError(f"version must be '3' or '3.5', not {version!r}")
    path = Path(path)
    generator = torch.Generator().manual_seed(seed)
    special = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if version == "3.5" else {}
    transformer = SD3Transformer2DModel(
        **_joint_dimensions(), num_layers=3, pos_embed_max_size=24, **special
    )
    parts = [transformer, _vae(), *(_clip(width) for width in CLIP_WIDTHS)]
    if t5:
        parts.append(_t5())
    for part in parts:
        _randomise(part, generator)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=parts[1],
        text_encoder=parts[2],
        text_encoder_2=parts[3],
        text_encoder_3=parts[4] if t5 else None,
        tokenizer=_clip_tokenizer("<|endoftext|>"),
        tokenizer_2=_clip_tokenizer("!"),
        tokenizer_3=_t5_tokenizer() if t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | (scheduler or {}))),
    )
    pipeline.save_pretrained(path)
    for index in range(controlnets):
        net = SD3ControlNetModel(
            **_joint_dimensions(),
            num_layers=2 if index % 2 == 0 else 1,
            pos_embed_max_size=24,
            force_zeros_for_pooled_projection=index % 2 == 0,
            **(special | ({"dual_attention_layers": (0,)} if special else {})),
        )
        _randomise(net, generator)
        net.save_pretrained(path / f"controlnet_{index}")
    for index in range(loras):
        _save_lora(path, path / f"lora_{index}", generator, text=index % 2 == 0, t5=t5)


def make_large_controlnet(path: Path | str, *, seed: int = 0) -> None:
    """A ControlNet like the one of SD3.5 large: single blocks, no text, the transformer's own
    position table."""
    net = SD3ControlNetModel(
        **(_joint_dimensions() | {"joint_attention_dim": None}),
        num_layers=2,
        use_pos_embed=False,
        pos_embed_type=None,
        force_zeros_for_pooled_projection=False,
    )
    _randomise(net, torch.Generator().manual_seed(seed))
    net.save_pretrained(path)


def _joint_dimensions() -> dict[str, Any]:
    return {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": T5_WIDTH,
        "caption_projection_dim": HEADS * HEAD_DIM,
        "pooled_projection_dim": sum(CLIP_WIDTHS),
    }


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip(width: int) -> CLIPTextModelWithProjection:
    vocabulary = len(_clip_vocabulary())
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            projection_dim=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(_t5_vocabulary()),
            d_model=T5_WIDTH,
            d_kv=24,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


def _randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every weight anew, zero-initialised ones too, so that each part counts in the image."""
    module.eval().requires_grad_(False)
    for name, weight in sorted(module.named_parameters()):
        if weight.ndim >= 2:
            fan_in = math.prod(weight.shape[1:])
            weight.normal_(0.0, 1.0 / math.sqrt(fan_in), generator=generator)
        elif name.endswith("bias"):
            weight.normal_(0.0, 0.1, generator=generator)


def _clip_vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    for first, second in _clip_merges():
        tokens.append(first + second)
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def _clip_merges() -> list[tuple[str, str]]:
    """Merges that make each of WORDS one token, from its left end."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        joined = pieces[0]
        for piece in pieces[1:]:
            merges[joined, piece] = None
            joined += piece
    return list(merges)


def _clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    return CLIPTokenizer(
        vocab=_clip_vocabulary(),
        merges=_clip_merges(),
        pad_token=pad_token,
        model_max_length=77,
    )


def _t5_vocabulary() -> list[tuple[str, float]]:
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    return [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((letter, -6.0) for letter in letters),
        *(("▁" + word, -3.0) for word in WORDS),
    ]


def _t5_tokenizer() -> T5TokenizerFast:
    return T5TokenizerFast(
        vocab=_t5_vocabulary(), extra_ids=0, additional_special_tokens=[], model_max_length=512
    )


def _save_lora(
    pipeline: Path, folder: Path, generator: torch.Generator, *, text: bool, t5: bool
) -> None:
    """A LoRA in the format that diffusers' training scripts write."""
    layers: dict[str, Any] = {
        "transformer_lora_layers": _lora_layers(
            SD3Transformer2DModel.from_pretrained(pipeline / "transformer"),
            _TRANSFORMER_LORA,
            generator,
        )
    }
    for part in ("text_encoder", "text_encoder_2") if text else ():
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(
            _lora_layers(
                CLIPTextModelWithProjection.from_pretrained(pipeline / part), _TEXT_LORA, generator
            )
        )
    StableDiffusion3Pipeline.save_lora_weights(folder, **layers)


def _lora_layers(
    model: Any, targets: tuple[str, ...], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(targets)))
    for name, weight in sorted(model.named_parameters()):
        if "lora_" in name:
            weight.data.normal_(0.0, 0.3, generator=generator)
    return get_peft_model_state_dict(model)
