# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Through gateway, node processes and gRPC, the picture is still diffusers' to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from setups import SETUPS, TINY

from benchmarks.exact import through_the_service
from benchmarks.reference import Setup, cases, draw


@pytest.mark.usefixtures("fork_server")
async def test_every_case_is_byte_identical_to_diffusers(
    setup_of: Callable[[str], Setup], tmp_path: Path
) -> None:
    names = [*SETUPS]
    if (TINY / "pipeline/model_index.json").exists():
        names += ["tiny-f32", "tiny-bf16"]
    setups = {name: setup_of(name) for name in names}
    wanted = {name: cases(setup) for name, setup in setups.items()}
    ours = await through_the_service(setups, wanted, tmp_path)
    different = [
        (name, case.name)
        for name, setup in setups.items()
        for case in wanted[name]
        if ours[name, case.name] != draw(setup, case)
    ]
    assert not different
