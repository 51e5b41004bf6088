# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Pruning artifacts with random weights: router, curve and adapter all count in the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

from shiva_kernels import Artifact, RatioCurve, ShippedTable
from shiva_kernels.adapter import Adapter

BUDGETS = (0.8, 0.6, 0.4)
SIGMAS = tuple(i / 8 for i in range(8, 0, -1))
_ADAPTER = {
    "r": 2,
    "lora_alpha": 4,
    "use_dora": True,
    "target_modules": ["to_q", "add_v_proj", "net.2"],
}


def make_artifact(pipeline: Path, folder: Path, seed: int = 3) -> Path:
    """Written to `folder`, for the transformer of `pipeline`; k differs by step and by block."""
    torch.manual_seed(seed)
    transformer: Any = SD3Transformer2DModel.from_pretrained(pipeline / "transformer")
    artifact = Artifact.untrained(transformer, tokens=64, sigmas=SIGMAS, budgets=BUDGETS)
    count = len(artifact.backbone.sketch)
    curve = RatioCurve((1.0, 0.2, -1.5), tuple(0.6 - 1.2 * i for i in range(count - 1)))
    artifact.tables = {b: ShippedTable(b, curve, SIGMAS, 64) for b in BUDGETS}
    artifact.adapter = _adapter(transformer)
    return artifact.save(folder)


def _adapter(transformer: Any) -> Adapter:
    inject_adapter_in_model(LoraConfig(**_ADAPTER), transformer, adapter_name="shiva")
    for name, weight in sorted(transformer.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    weights = get_peft_model_state_dict(transformer, adapter_name="shiva")
    return Adapter(_ADAPTER, weights)
