# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Weights on this machine: folders, files, mounted volumes and what comes with the package."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kubediffusion import sources
from kubediffusion.errors import InvalidInput, SourceUnavailable, UnsupportedModel


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    (folder / "vae").mkdir(parents=True)
    (folder / "vae/config.json").write_text("{}")
    index = {"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"], "t5": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_folder_is_served_where_it_lies(pipeline: Path) -> None:
    assert sources.open(f"file://{pipeline}").path == pipeline
    assert sources.open(f"file://{pipeline}", subfolder="vae").path == pipeline / "vae"
    index = sources.read_index(f"file://{pipeline}")
    assert (index.components, index.commit) == ({"vae": "AutoencoderKL"}, "")


def test_a_single_file_is_a_source(tmp_path: Path) -> None:
    file = tmp_path / "ink.safetensors"
    file.touch()
    assert sources.open(f"file://{file}").path == file


def test_what_is_not_there_says_what_to_check(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match="nowhere; check the path, and that the volume"):
        sources.open(f"file://{tmp_path}/nowhere")
    with pytest.raises(SourceUnavailable) as failure:
        sources.open(f"file://{tmp_path}", subfolder="nowhere")
    assert failure.value.reason == "SourceNotFound"


def test_what_may_not_be_read_says_so(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(SourceUnavailable, match="Permission denied; let this process") as failure:
        sources.open(f"file://{pipeline}")
    assert failure.value.reason == "Unauthorized"


@pytest.mark.parametrize("subfolder", ["..", "vae/../..", "/etc", "vae\\..\\..", "a\0b"])
def test_a_subfolder_cannot_leave_its_source(pipeline: Path, subfolder: str) -> None:
    with pytest.raises(InvalidInput) as failure:
        sources.open(f"file://{pipeline}", subfolder=subfolder)
    assert failure.value.field == "subfolder"


def test_a_linked_folder_cannot_leave_its_source(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (pipeline / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidInput, match="leads out"):
        sources.open(f"file://{pipeline}", subfolder="out")


def test_links_inside_a_source_are_followed(pipeline: Path, tmp_path: Path) -> None:
    # A mounted volume's own layout, and that of the Hub's cache, whose files lie beside.
    (pipeline / "alias").symlink_to("vae")
    (tmp_path / "blob").touch()
    (pipeline / "weights.safetensors").symlink_to(tmp_path / "blob")
    assert sources.open(f"file://{pipeline}", subfolder="alias").path == pipeline / "alias"
    sources.open(f"file://{pipeline}", subfolder="weights.safetensors")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "sd3",
        "/models/sd3",
        "file://",
        "http://host/x",
        "s3://bucket/x",
        "hf://",
        "hf://name",
        "hf://org/../name",
        "hf:///org/name",
        "hf://org/name?x=1",
        "hf://-org/name",
        "builtin://../tiny-sd3",
        "builtin:///etc",
    ],
)
def test_what_is_no_uri_of_a_source_is_refused(uri: str) -> None:
    with pytest.raises(InvalidInput) as failure:
        sources.open(uri)
    assert failure.value.field == "uri"


def test_an_unknown_builtin_names_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny/pipeline").mkdir(parents=True)
    (tmp_path / "tiny/pipeline/model_index.json").write_text('{"vae": ["diffusers", "V"]}')
    (tmp_path / "tiny/loras/ink").mkdir(parents=True)
    monkeypatch.setattr(sources, "_builtin_root", lambda: tmp_path)
    assert sources.builtins() == ["tiny"]
    assert sources.open("builtin://tiny").path == tmp_path / "tiny/pipeline"
    assert sources.open("builtin://tiny/loras/ink").path == tmp_path / "tiny/loras/ink"
    with pytest.raises(SourceUnavailable, match="it has tiny") as failure:
        sources.open("builtin://large")
    assert failure.value.reason == "SourceNotFound"


def test_a_folder_that_is_no_pipeline_is_told_from_a_torn_one(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel) as failure:
        sources.read_index(f"file://{tmp_path}")
    assert failure.value.reason == "WrongArchitecture"
    for torn in ('{"vae": ["diffu', "[]", "\udcff"):
        (tmp_path / "model_index.json").write_bytes(torn.encode(errors="surrogateescape"))
        with pytest.raises(UnsupportedModel) as failure:
            sources.read_index(f"file://{tmp_path}")
        assert failure.value.reason == "BadWeights"
        assert failure.value.field == "spec.pipeline.source.uri"


def test_reading_a_local_source_needs_no_library_of_the_hub(pipeline: Path) -> None:
    code = (
        "import sys; from kubediffusion import sources; sources.read_index(sys.argv[1]);"
        "assert not {'huggingface_hub', 'torch', 'tqdm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, f"file://{pipeline}"], check=True, timeout=120)
