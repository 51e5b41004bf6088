# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Of weights that lie there in several dtypes, one is fetched and counted."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

from kubediffusion.node.library import Library
from kubediffusion.node.weights import weight_files
from kubediffusion.v1alpha1 import node_pb2

NAMES = (
    "config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.fp16-00001-of-00002.safetensors",
    "model.fp16-00002-of-00002.safetensors",
    "model.fp16.safetensors",
)
PLAIN = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FP16 = [name for name in NAMES if name.startswith("model.fp16")]


@pytest.mark.parametrize(("variant", "expected"), [("", PLAIN), ("fp16", FP16)])
def test_only_the_variant_asked_for_is_fetched(variant: str, expected: list[str]) -> None:
    asked: list[str] = []

    class Stop(Exception):
        pass

    def note(uri: str, revision: str = "", *, allow: tuple[str, ...], progress: object) -> None:
        asked.extend(allow)
        raise Stop

    library = Library(lambda name: None, note)  # type: ignore[arg-type]
    spec = node_pb2.ModelSpec(uri="hf://a/b", subfolder="text_encoder_3", variant=variant)
    with pytest.raises(Stop):
        library.fetch(spec, lambda done, total: None)  # type: ignore[arg-type]
    taken = [n for n in NAMES if any(fnmatch(f"text_encoder_3/{n}", a) for a in asked)]
    assert [n for n in taken if n.endswith(".safetensors")] == expected
    assert "config.json" in taken


@pytest.mark.parametrize(("variant", "expected"), [("", PLAIN), ("fp16", FP16), ("bf16", None)])
def test_only_the_variant_asked_for_is_counted(
    variant: str, expected: list[str] | None, tmp_path: Path
) -> None:
    for name in NAMES:
        (tmp_path / name).touch()
    found = [file.name for file in weight_files(tmp_path, variant)]
    assert found == (expected or [n for n in NAMES if n.endswith(".safetensors")])
