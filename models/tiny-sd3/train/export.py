# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Write the trained networks as a diffusers pipeline that a plain `from_pretrained` loads."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import nn

from train.common import load_checkpoint
from train.flow import SHIFT
from train.model import FlowNet, make_transformer, set_positions
from train.text import tie_cases
from train.vae import load_vae


def load_flow(work: Path, pixels: int) -> FlowNet:
    """The averaged weights of a flow training; fresh ones if there was none."""
    net = FlowNet(work)
    state = load_checkpoint(work / f"flow{pixels}.pt")
    if state:
        net.load_state_dict(state["ema"])
    set_positions(net.transformer, pixels)
    return net.eval()


def build_pipeline(work: Path, pixels: int) -> StableDiffusion3Pipeline:
    """The pipeline in memory, with diffusers' own attention."""
    net = load_flow(work, pixels)
    tie_cases(net.text.t5, net.text.t5_tokenizer)
    transformer = make_transformer()
    transformer.load_state_dict(net.transformer.state_dict())
    transformer.register_to_config(sample_size=pixels // 8)
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=load_vae(work),
        text_encoder=net.text.clip_1,
        tokenizer=net.text.clip_tokenizer,
        text_encoder_2=net.text.clip_2,
        tokenizer_2=net.text.clip_tokenizer,
        text_encoder_3=net.text.t5,
        tokenizer_3=net.text.t5_tokenizer,
    )


def save_half(model: nn.Module, folder: Path) -> None:
    """Store in float16, half the size; diffusers loads it as float32 unless told otherwise."""
    model.half()
    model.save_pretrained(folder)  # type: ignore[operator]
    model.float()


def export_pipeline(work: Path, folder: Path, pixels: int) -> None:
    """Text encoders stay float32: transformers would load float16 ones as float16.

    Their pipeline call would then mix types with the float32 transformer and fail.
    """
    pipeline = build_pipeline(work, pixels)
    pipeline.save_pretrained(folder)
    save_half(pipeline.transformer, folder / "transformer")
    save_half(pipeline.vae, folder / "vae")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"wrote {folder}: {size / 1e6:.1f} MB", flush=True)


def half_rounded(pipeline: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """Round the stored-as-float16 parts, so that measuring sees what is shipped."""
    for model in (pipeline.transformer, pipeline.vae):
        model.to(torch.float16).to(torch.float32)
    return pipeline
