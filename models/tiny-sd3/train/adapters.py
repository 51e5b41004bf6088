# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What is trained on top of the frozen pipeline: a ControlNet that follows edges, a style LoRA."""

import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.nn import functional

from train.common import (
    Averages,
    Budget,
    CurveLog,
    flat_then_linear,
    load_checkpoint,
    save_checkpoint,
    set_rate,
    to_tensor,
)
from train.export import load_flow, save_half
from train.flow import FlowPlan, noisy, t5_length
from train.model import FlowNet
from train.text import Context, decorate
from train.vae import LatentCode
from train.world import Scene, Style, caption, draw, is_held_out, sample_scene

CONTROL_BLOCKS = 3
LORA_RANK = 16
LORA_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    *("ff.net.0.proj", "ff.net.2"),
)


def training_scenes(rng: random.Random) -> Iterator[Scene]:
    """Scenes from the training side of the split."""
    while True:
        scene = sample_scene(rng)
        if not is_held_out(scene):
            yield scene


def control_caption(scene: Scene, rng: random.Random) -> str:
    """Mostly captions that do not say where: then only the edges do."""
    lot = rng.random()
    if lot < 0.15:
        return ""
    if lot < 0.3:
        return "shapes"
    return decorate(caption(scene, rng, vague=lot < 0.7), rng)


def style_caption(scene: Scene, rng: random.Random) -> str:
    """As for the base model; the style is in the weights, so no word asks for it."""
    return "" if rng.random() < 0.1 else decorate(caption(scene, rng), rng)


def make_controlnet(transformer: SD3Transformer2DModel) -> SD3ControlNetModel:
    """The transformer's first blocks, with an input for edges that starts at 0."""
    config = dict(transformer.config) | {"num_layers": CONTROL_BLOCKS}
    known = inspect.signature(SD3ControlNetModel).parameters
    options = {key: value for key, value in config.items() if key in known}
    # Else the pipeline would replace the pooled caption by zeros.
    options["force_zeros_for_pooled_projection"] = False
    controlnet = SD3ControlNetModel(**options)
    missing, _ = controlnet.load_state_dict(transformer.state_dict(), strict=False)
    fresh = {name.split(".")[0] for name in missing}
    if fresh != {"controlnet_blocks", "pos_embed_input"}:
        raise RuntimeError(f"not taken from the transformer: {sorted(fresh)}")
    return controlnet


def add_lora(transformer: SD3Transformer2DModel) -> None:
    """Low-rank additions to the transformer's layers, 0 at the start."""
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        init_lora_weights="gaussian",
        target_modules=list(LORA_LAYERS),
    )
    transformer.add_adapter(config)


@dataclass
class Adapter:
    """An adapter in training: how it takes part, what is saved, and how it is written."""

    name: str
    style: Style
    parameters: list[nn.Parameter]
    write_caption: Callable[[Scene, random.Random], str]
    predict: Callable[[torch.Tensor, torch.Tensor, Context, list[Scene]], torch.Tensor]
    state: Callable[[], dict[str, torch.Tensor]]
    restore: Callable[[dict[str, torch.Tensor]], object]
    export: Callable[[Path], None]


def control_adapter(net: FlowNet, code: LatentCode) -> Adapter:
    """The ControlNet for edges."""
    controlnet = make_controlnet(net.transformer)
    for block in controlnet.transformer_blocks:
        block.attn.set_processor(net.attention)

    def predict(
        mixed: torch.Tensor, time: torch.Tensor, context: Context, wanted: list[Scene]
    ) -> torch.Tensor:
        lines = [draw(replace(scene, style="edges"), mixed.shape[-1] * 8) for scene in wanted]
        net.attention.set(context)
        residuals = controlnet(
            hidden_states=mixed,
            controlnet_cond=code.encode(to_tensor(np.stack(lines))),
            timestep=time * 1000,
            encoder_hidden_states=context.tokens,
            pooled_projections=context.pooled,
            return_dict=False,
        )[0]
        return net.velocity(mixed, time, context, block_controlnet_hidden_states=residuals)

    return Adapter(
        name="controlnet",
        style="filled",
        parameters=list(controlnet.parameters()),
        write_caption=control_caption,
        predict=predict,
        state=controlnet.state_dict,
        restore=controlnet.load_state_dict,
        export=lambda folder: save_half(controlnet, folder),
    )


def lora_adapter(net: FlowNet) -> Adapter:
    """The LoRA that draws outlines."""
    add_lora(net.transformer)

    def predict(
        mixed: torch.Tensor, time: torch.Tensor, context: Context, _: list[Scene]
    ) -> torch.Tensor:
        return net.velocity(mixed, time, context)

    def export(folder: Path) -> None:
        layers = get_peft_model_state_dict(net.transformer)
        half = {key: value.half().contiguous() for key, value in layers.items()}
        StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=half)

    return Adapter(
        name="lora",
        style="outline",
        parameters=[p for name, p in net.transformer.named_parameters() if "lora_" in name],
        write_caption=style_caption,
        predict=predict,
        state=lambda: get_peft_model_state_dict(net.transformer),
        restore=lambda state: set_peft_model_state_dict(net.transformer, state),
        export=export,
    )


class AdapterTrainer:
    """Trains one adapter in this process; a second call continues where the first ended."""

    def __init__(self, plan: FlowPlan, name: str) -> None:
        self.plan = plan
        torch.set_num_threads(1)
        torch.manual_seed(plan.seed + 1)
        self.net = load_flow(plan.work, plan.pixels).requires_grad_(False)
        self.code = LatentCode.at(plan.work / "latent_code.pt")
        is_control = name == "controlnet"
        self.adapter = (
            control_adapter(self.net, self.code) if is_control else lora_adapter(self.net)
        )
        self.optimizer = torch.optim.AdamW(
            self.adapter.parameters, lr=plan.adam_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.path = plan.work / f"{name}.pt"
        state = load_checkpoint(self.path)
        if state:
            self.adapter.restore(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"] if state else 0
        self.budget = Budget(plan.minutes, state["spent"] if state else 0.0)
        self.log = CurveLog(plan.work / "logs" / f"{name}.csv", name, append=bool(state))

    def run(self) -> None:
        """Train until the time is used up."""
        averages = Averages()
        while self.budget.progress < 1:
            rate = self.plan.adam_rate * flat_then_linear(self.budget.progress)
            set_rate([self.optimizer], rate * min(1, (self.step + 1) / 30))
            averages.add(mse=self._train_step())
            self.step += 1
            if self.step % 25 == 0:
                self.log.write(self.budget, step=self.step, **averages.take())
            if self.step % 100 == 0:
                self.save()
        self.save()

    def _train_step(self) -> float:
        seed = (self.plan.seed * 1_000_003 + self.step) * 64 + 63
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        stream = training_scenes(rng)
        scenes = [replace(next(stream), style=self.adapter.style) for _ in range(self.plan.batch)]
        captions = [self.adapter.write_caption(scene, rng) for scene in scenes]
        images = np.stack([draw(scene, self.plan.pixels) for scene in scenes])
        mixed, time, target = noisy(self.code.encode(to_tensor(images)), generator)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                tokens = self.net.text.tokenize(captions, t5_length(rng))
                context = self.net.text(tokens, generator)
            velocity = self.adapter.predict(mixed, time, context, scenes)
        loss = functional.mse_loss(velocity.float(), target)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.adapter.parameters, 1.0)
        self.optimizer.step()
        return loss.item()

    def save(self) -> None:
        """Keep everything a restart needs."""
        save_checkpoint(
            self.path,
            model=self.adapter.state(),
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            spent=self.budget.elapsed,
        )


def train_adapter(plan: FlowPlan, name: str) -> None:
    """Train "controlnet" or "lora"."""
    AdapterTrainer(plan, name).run()


def export_adapter(plan: FlowPlan, name: str, folder: Path) -> None:
    """Write a trained adapter in diffusers' layout."""
    AdapterTrainer(plan, name).adapter.export(folder)
