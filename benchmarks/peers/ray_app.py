# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Peer (b): the same three stages as a Ray Serve application, composed by deployment handles.

Tensors travel as Ray objects between the stages. Each stage is diffusers' own code: the pipeline
with the other stages' models left out.
"""

from __future__ import annotations

import io
from typing import Any

import ray
from ray import serve

ONE_THREAD = {"env_vars": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}}
OPTIONS: dict[str, Any] = {"num_cpus": 0.1, "runtime_env": ONE_THREAD}
# Serve runs a synchronous method in a thread of its own for each request, and a diffusers pipeline
# must not be called from two threads: the others wait in Serve's router.
STAGE: dict[str, Any] = {"ray_actor_options": OPTIONS, "max_ongoing_requests": 1}


def _pipeline(path: str, keep: set[str]) -> Any:
    from diffusers import StableDiffusion3Pipeline

    models = {"text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"}
    pipe = StableDiffusion3Pipeline.from_pretrained(path, **dict.fromkeys(models - keep))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@serve.deployment(**STAGE)
class TextEncoder:
    def __init__(self, path: str) -> None:
        self.pipe = _pipeline(path, {"text_encoder", "text_encoder_2", "text_encoder_3"})

    def __call__(self, prompt: str, guidance: float, length: int) -> Any:
        import torch

        with torch.no_grad():
            return self.pipe.encode_prompt(
                prompt,
                None,
                None,
                do_classifier_free_guidance=guidance > 1,
                max_sequence_length=length,
            )


@serve.deployment(**STAGE)
class Denoiser:
    def __init__(self, path: str) -> None:
        from diffusers import AutoencoderKL

        self.pipe = _pipeline(path, {"transformer"})
        config = AutoencoderKL.load_config(f"{path}/vae")
        self.pipe.vae_scale_factor = 2 ** (len(config["block_out_channels"]) - 1)

    def __call__(self, embeds: Any, seed: int, steps: int, guidance: float) -> Any:
        import torch

        prompt, negative, pooled, negative_pooled = embeds
        size = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return self.pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=negative_pooled,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=size,
            width=size,
            output_type="latent",
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images


@serve.deployment(**STAGE)
class Decoder:
    def __init__(self, path: str) -> None:
        self.pipe = _pipeline(path, {"vae"})

    def __call__(self, latents: Any) -> bytes:
        import torch

        vae = self.pipe.vae
        with torch.no_grad():
            z = latents / vae.config.scaling_factor + vae.config.shift_factor
            image = vae.decode(z, return_dict=False)[0]
        out = io.BytesIO()
        self.pipe.image_processor.postprocess(image)[0].save(out, "PNG")
        return out.getvalue()


@serve.deployment(ray_actor_options=OPTIONS, max_ongoing_requests=64)
class Workflow:
    def __init__(self, text: Any, denoiser: Any, decoder: Any) -> None:
        self.text, self.denoiser, self.decoder = text, denoiser, decoder

    async def generate(
        self, prompt: str, seed: int, steps: int, guidance: float, length: int
    ) -> bytes:
        embeds = self.text.remote(prompt, guidance, length)
        latents = self.denoiser.remote(embeds, seed, steps, guidance)
        return await self.decoder.remote(latents)


def start(path: str) -> Any:
    """Start Ray and the application; `handle.generate.remote(…)` gives PNG bytes."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(logging_config={"log_level": "ERROR"})
    app = Workflow.bind(TextEncoder.bind(path), Denoiser.bind(path), Decoder.bind(path))
    return serve.run(app, name="sd3", route_prefix=None)


def stop() -> None:
    serve.shutdown()
    ray.shutdown()
