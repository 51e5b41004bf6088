# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a component's weight files say of themselves, before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubediffusion.errors import UnsupportedModel

# Up to this size all bytes are hashed; beyond, the headers (names, shapes, offsets) and sizes.
HASHED_BYTES = 64 * 2**20
# safetensors' own limit for a header.
MAX_HEADER_BYTES = 100_000_000
_CHUNK = 2**20
_FLOATS = {"F64", "F32", "F16", "BF16"}
_WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Weights:
    """`nbytes` is what the tensors take once they are in the dtype asked for."""

    digest: str
    nbytes: int

    def merged(self, other: Weights) -> Weights:
        """Of a model into which `other` is merged."""
        both = hashlib.sha256(f"{self.digest}\0{other.digest}".encode())
        return Weights(f"sha256:{both.hexdigest()}", self.nbytes + other.nbytes)


def inspect(folder: Path, variant: str = "", dtype: str = "") -> Weights:
    """Of the safetensors files in `folder` (of one variant). Raises UnsupportedModel."""
    files = weight_files(folder, variant)
    whole = sum(file.stat().st_size for file in files) <= HASHED_BYTES
    digest, nbytes = hashlib.sha256(), 0
    for file in files:
        header, raw = _header(file)
        nbytes += sum(_nbytes(entry, dtype) for entry in header.values())
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        if whole:
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
        else:
            digest.update(raw)
    return Weights(f"sha256:{digest.hexdigest()}" if files else "", nbytes)


def weight_files(folder: Path, variant: str = "") -> Sequence[Path]:
    """Those that a loader would take: of the variant where it has some, else the plain ones."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    marks = (f".{variant}.", f".{variant}-")  # of one file, or of many
    if variant:
        chosen = [file for file in files if any(mark in file.name for mark in marks)]
    else:
        chosen = [file for file in files if "." not in file.stem]
    return chosen or files


def _header(file: Path) -> tuple[dict[str, Any], bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _torn(file, "its header is cut off")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _torn(file, "its header cannot be read") from error
    if 8 + length + end > size:
        raise _torn(file, f"it has {size} bytes of {8 + length + end}")
    return header, raw


def _nbytes(entry: dict[str, Any], dtype: str) -> int:
    begin, end = entry["data_offsets"]
    if entry["dtype"] in _FLOATS and dtype in _WIDTH:
        return math.prod(entry["shape"]) * _WIDTH[dtype]
    return end - begin


def _torn(file: Path, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{file.name} is no whole safetensors file: {why}; fetch it again", reason="BadWeights"
    )
