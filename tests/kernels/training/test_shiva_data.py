# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Own data: a folder of pictures with captions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shiva_kernels.errors import ShivaError
from shiva_kernels.training import data
from shiva_kernels.training.data import FolderSource, captioned_pictures, read_picture


def picture(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (40, 20)) -> None:
    Image.new("RGB", size, color).save(path)


class FakeVae:
    """Latents are the picture's corner, so that a batch tells which picture it holds."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(shift_factor=0.5, scaling_factor=2.0)

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, images: torch.Tensor) -> Any:
        self.calls += 1
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=images[:, :, :2, :2]))


class FakePipeline:
    def __init__(self) -> None:
        self.vae = FakeVae()
        self.asked: list[str] = []

    def encode_prompt(self, prompt: list[str], **_: Any) -> Any:
        self.asked += prompt
        lengths = torch.tensor([float(len(text)) for text in prompt])
        return lengths[:, None, None].expand(-1, 4, 3), None, lengths[:, None].expand(-1, 2), None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(tmp_path / "a.png", (255, 0, 0))
    (tmp_path / "a.txt").write_text("a red one\n")
    picture(tmp_path / "b.jpg", (0, 0, 255))
    (tmp_path / "b.txt").write_text("blue")
    picture(tmp_path / "without.png", (0, 0, 0))
    return tmp_path


def test_captions_lie_beside_pictures(folder: Path) -> None:
    found = [(path.name, text) for path, text in captioned_pictures(folder)]
    assert found == [("a.png", "a red one"), ("b.jpg", "blue")]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_captions_come_from_a_list(folder: Path, kind: str) -> None:
    row = {"file_name": "without.png", "text": "black, and a comma"}
    text = (
        json.dumps(row) if kind == "jsonl" else 'file_name,text\nwithout.png,"{text}"'.format(**row)
    )
    (folder / f"metadata.{kind}").write_text(text + "\n")
    found = {path.name: text for path, text in captioned_pictures(folder)}
    assert found["without.png"] == "black, and a comma"
    assert found["a.png"] == "a red one"


def test_a_list_with_a_missing_picture_is_refused(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\nnone.png,hello\n")
    with pytest.raises(ShivaError, match=r"none\.png"):
        list(captioned_pictures(folder))


def test_an_empty_folder_says_what_to_put_there(tmp_path: Path) -> None:
    with pytest.raises(ShivaError, match=r"NAME\.txt beside NAME\.png"):
        FolderSource(tmp_path, FakePipeline(), 16)  # type: ignore[arg-type]


def test_the_middle_square_is_taken(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    read = read_picture(tmp_path / "x.png", 10)
    assert read.shape == (3, 10, 10)
    assert read.min() > 0.99


def test_a_batch_is_a_function_of_its_seed(folder: Path) -> None:
    pipeline = FakePipeline()
    source = FolderSource(folder, pipeline, 16)  # type: ignore[arg-type]
    one, again, other = source.batch(1, 8), source.batch(1, 8), source.batch(2, 8)
    assert torch.equal(one.latents, again.latents)
    assert one.captions == again.captions != other.captions
    # (value - shift) * scale, of a red picture's first channel; captions follow their pictures.
    for latent, text, context in zip(one.latents, one.captions, one.context, strict=True):
        assert float(latent[0, 0, 0]) == (1.0 if text == "a red one" else -3.0)
        assert float(context[0, 0]) == len(text)
    assert pipeline.vae.calls == 2


def test_captions_of_a_batch_do_not_push_each_other_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_CAPTIONS", 2)
    asked: list[str] = []

    def encode_prompt(prompt: list[str], **rest: Any) -> tuple[Any, ...]:
        asked.extend(prompt)
        lengths = torch.tensor([float(len(text)) for text in prompt])
        return lengths[:, None, None], None, lengths[:, None], None

    pipeline: Any = SimpleNamespace(encode_prompt=encode_prompt)
    captions = data.Captions(pipeline)
    captions.encode(["", "a"])
    _, pooled = captions.encode(["", "bb", "ccc", "bb"])
    assert pooled[:, 0].tolist() == [0, 2, 3, 2]
    captions.encode(["ccc", "bb"])
    assert asked == ["", "a", "bb", "ccc"]  # the newest two are kept


def test_captions_are_left_out_for_guidance(folder: Path) -> None:
    source = FolderSource(folder, FakePipeline(), 16)  # type: ignore[arg-type]
    texts = source.batch(3, 400, dropout=0.25).captions
    assert 0.18 < texts.count("") / 400 < 0.32
    assert "" not in source.batch(3, 50).captions
