# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from setups import SETUPS, TINY
from small_pipelines import make_sd3

from benchmarks.reference import Setup

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def setup_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Setup]:
    """Small random pipelines by name, and the trained one as "tiny" and "tiny-bf16"."""
    made: dict[str, Setup] = {}

    def make(name: str) -> Setup:
        if name.startswith("tiny"):
            dtype = "bfloat16" if name.endswith("bf16") else "float32"
            controlnets = {"edges": TINY / "controlnets/edges"}
            loras = {p.name: p for p in sorted((TINY / "loras").iterdir())}
            return Setup(TINY / "pipeline", controlnets, loras, dtype)
        if name not in made:
            version, t5, dtype = SETUPS[name]
            path = tmp_path_factory.mktemp(name)
            make_sd3(path, version=version, t5=t5, controlnets=2, loras=2)
            made[name] = Setup(
                path,
                {"first": path / "controlnet_0", "second": path / "controlnet_1"},
                {"one": path / "lora_0", "two": path / "lora_1"},
                dtype,
            )
        return made[name]

    return make
