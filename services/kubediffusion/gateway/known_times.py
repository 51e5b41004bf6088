# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Run times that were measured before this gateway was there."""

from __future__ import annotations

import json
from pathlib import Path

from kubediffusion.errors import InvalidInput
from kubediffusion.scheduling.profiles import Profiles


def read_profiles(path: Path, into: Profiles) -> None:
    """A folder that `kubediffusion profile` wrote, or its model_profiles.json. Raises InvalidInput.

    Models are known by identity and devices by fingerprint, so what is about others does no harm.
    """
    file = path / "model_profiles.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{file} cannot be read: {error}", field="profiles") from None
    try:
        into.begin_with(content["stages"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"{file} is not what `kubediffusion profile` writes: "
            f"{type(error).__name__}: {error}; measure anew with it",
            field="profiles",
        ) from None
