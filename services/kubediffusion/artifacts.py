# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A pruning artifact's folder, looked at without torch: what the trainer of `shiva_kernels` wrote.

shiva.json          which backbone it is for, and a table for each budget
shiva.safetensors   router, ratio policy and adapter
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from kubediffusion.errors import UnsupportedModel

MANIFEST, WEIGHTS = "shiva.json", "shiva.safetensors"
FIELD = "pruning.artifact"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def check_files(folder: Path, uri: str, names: Sequence[str] = (MANIFEST, WEIGHTS)) -> None:
    """Raises UnsupportedModel unless `names` are in `folder`, which came from `uri`."""
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return
    beside = [folder] if folder.is_file() else sorted(folder.glob("*"))
    pickles = ", ".join(file.name for file in beside if file.suffix in _PICKLES)
    what = f"; {pickles} could run code and is never loaded" if pickles else ""
    raise UnsupportedModel(
        f"{uri} is no pruning artifact: it has no {missing[0]}{what}. An artifact is a folder with "
        f"{MANIFEST} and {WEIGHTS}, as the trainer exports it",
        field=FIELD,
        reason="NotSafetensors" if pickles else "WrongArchitecture",
    )


def read_budgets(folder: Path, uri: str) -> tuple[float, ...]:
    """The mean keep ratios that the artifact has tables for, the largest first.

    Raises UnsupportedModel.
    """
    check_files(folder, uri, [MANIFEST])
    try:
        tables = json.loads((folder / MANIFEST).read_text())["tables"]
        return tuple(sorted((float(table["budget"]) for table in tables), reverse=True))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UnsupportedModel(
            f"{uri}: {MANIFEST} cannot be read: {type(error).__name__}: {error}; export it again",
            field=FIELD,
            reason="BadWeights",
        ) from error
