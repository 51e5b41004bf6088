# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from puppets import Rig


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """A node that serves the puppets `enc`, `dit` and `vae`."""
    rig = Rig(tmp_path, shm_dir=tmp_path / "shm")
    await rig.start()
    yield rig
    await rig.stop()
