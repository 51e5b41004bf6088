# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A cheap picture of latents, drawn where no VAE is at hand."""

from __future__ import annotations

import numpy as np
import torch

PREVIEW_SIDE = 128
# So many latents tell the colours: a preview costs the same however large the picture.
_SAMPLES = 4096
_LIMIT = 1e4


def picture_of(latents: torch.Tensor) -> np.ndarray:
    """(1, C, h, w) -> uint8 (H, W, 3): the three directions in which the latents vary most.

    False colours, but the composition shows. A decoded preview would cost the VAE's time, and
    its node a task, at every preview. Latents that are not finite are drawn as if they were 0.
    """
    x = latents[0].float().cpu().nan_to_num(0.0, 0.0, 0.0).clamp(-_LIMIT, _LIMIT)
    channels, height, width = x.shape
    flat = x.reshape(channels, -1).T
    sample = flat[:: max(1, len(flat) // _SAMPLES)]
    mean = sample.mean(0)
    sample = sample - mean
    axes = torch.linalg.eigh((sample.T @ sample).double()).eigenvectors.T.flip(0)[:3].float()
    # An eigenvector's sign is arbitrary: fix it, or colours flicker from preview to preview.
    axes = axes * torch.where(axes.sum(1, keepdim=True) < 0, -1.0, 1.0)
    bounds = (sample @ axes.T).quantile(torch.tensor([0.02, 0.98]), 0)
    rgb = ((flat - mean) @ axes.T - bounds[0]) / (bounds[1] - bounds[0]).clamp_min(1e-6)
    if rgb.shape[1] < 3:
        rgb = rgb[:, :1].expand(-1, 3)
    pixels = (rgb.clamp(0, 1) * 255).round().to(torch.uint8)
    image = pixels.reshape(height, width, 3).numpy()
    times = max(1, PREVIEW_SIDE // max(height, width))
    return image.repeat(times, 0).repeat(times, 1)
