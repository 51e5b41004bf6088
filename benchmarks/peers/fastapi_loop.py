# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Peer (a): what most people deploy. One process, one diffusers pipeline, FastAPI in front.

    python -m benchmarks.peers.fastapi_loop PIPELINE_DIR SOCKET_PATH

One request at a time runs on the device, as the pipeline is not re-entrant.
"""

from __future__ import annotations

import io
import sys
import threading

import torch
import uvicorn
from diffusers import StableDiffusion3Pipeline
from fastapi import FastAPI, Response
from pydantic import BaseModel


class Body(BaseModel):
    prompt: str
    seed: int
    steps: int = 28
    guidance: float = 4.0
    max_sequence_length: int = 32


def build(pipeline_dir: str) -> FastAPI:
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    app = FastAPI()
    device = threading.Lock()

    @app.post("/generate")
    def generate(body: Body) -> Response:
        with device:
            image = pipe(
                body.prompt,
                num_inference_steps=body.steps,
                guidance_scale=body.guidance,
                max_sequence_length=body.max_sequence_length,
                generator=torch.Generator("cpu").manual_seed(body.seed),
            ).images[0]
        out = io.BytesIO()
        image.save(out, "PNG")
        return Response(out.getvalue(), media_type="image/png")

    return app


if __name__ == "__main__":
    uvicorn.run(build(sys.argv[1]), uds=sys.argv[2], log_level="warning")
