# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_pipelines import make_sd3

from kubediffusion.models.base import LoadSpec

SpecOf = Callable[..., LoadSpec]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline with a ControlNet and two LoRAs; only to be read."""
    path = tmp_path_factory.mktemp("sd3")
    make_sd3(path, controlnets=1, loras=2)
    return path


@pytest.fixture
def pipeline(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return shutil.copytree(pristine, tmp_path / "pipeline")


@pytest.fixture(scope="session")
def spec_of() -> SpecOf:
    def make(pipeline: Path, component: str, **rest: Any) -> LoadSpec:
        folder = "controlnet_0" if component == "controlnet" else component
        return LoadSpec(
            identity=component,
            family="sd3",
            component=component,
            path=pipeline / folder,
            pipeline_path=pipeline,
            **rest,
        )

    return make
