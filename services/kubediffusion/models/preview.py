# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A cheap picture of latents, drawn where no VAE is at hand."""

from __future__ import annotations

import numpy as np
import torch

PREVIEW_SIDE = 128


def picture_of(latents: torch.Tensor) -> np.ndarray:
    """(1, C, h, w) -> uint8 (H, W, 3): the three directions in which the latents vary most.

    False colours, but the composition shows. A decoded preview would cost the VAE's time, and
    its node a task, at every preview.
    """
    x = latents[0].float().cpu()
    channels, height, width = x.shape
    flat = x.reshape(channels, -1).T
    flat = flat - flat.mean(0)
    axes = torch.linalg.svd(flat, full_matrices=False).Vh[:3]
    # A singular vector's sign is arbitrary: fix it, or colours flicker from preview to preview.
    axes = axes * torch.where(axes.sum(1, keepdim=True) < 0, -1.0, 1.0)
    rgb = flat @ axes.T
    if rgb.shape[1] < 3:
        rgb = rgb[:, :1].expand(-1, 3)
    low, high = rgb.quantile(0.02, 0), rgb.quantile(0.98, 0)
    rgb = ((rgb - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    image = (rgb.reshape(height, width, 3) * 255).round().to(torch.uint8).numpy()
    times = max(1, PREVIEW_SIDE // max(height, width))
    return image.repeat(times, 0).repeat(times, 1)
