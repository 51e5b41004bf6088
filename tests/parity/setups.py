# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The pipelines that parity is tested on: (version, with T5, dtype) by name."""

from __future__ import annotations

from pathlib import Path

TINY = Path(__file__).parent.parent.parent / "models" / "tiny-sd3"

SETUPS = {
    "sd3-f32": ("3", True, "float32"),
    "sd3-bf16": ("3", True, "bfloat16"),
    "sd3-no-t5": ("3", False, "float32"),
    "sd35-f32": ("3.5", True, "float32"),
    "sd35-no-t5-bf16": ("3.5", False, "bfloat16"),
}
