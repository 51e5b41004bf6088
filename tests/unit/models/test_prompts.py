# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What text encoders make of prompts, and which they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from kubediffusion import models
from kubediffusion.errors import InvalidInput
from kubediffusion.models.base import LoadSpec, Model

SpecOf = Callable[..., LoadSpec]
# The last one is longer than the CLIPs read: they take its beginning, as in diffusers.
PROMPTS = ("", " ", "a red circle", "ein Kreis über 蓝色 🟦\u200d\x00", "a red circle and " * 30)


@pytest.fixture(scope="module")
def encoders(pristine: Path, spec_of: SpecOf) -> dict[str, Model]:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return {name: models.load(spec_of(pristine, name)) for name in names}


@pytest.fixture(scope="module")
def without_t5(
    pristine: Path, spec_of: SpecOf, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Model]:
    """The CLIPs of a pipeline whose index names no T5."""
    folder = tmp_path_factory.mktemp("without-t5") / "pipeline"
    shutil.copytree(pristine, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return {name: models.load(spec_of(folder, name)) for name in ("text_encoder", "text_encoder_2")}


@pytest.fixture(scope="module")
def pipeline(pristine: Path) -> Any:
    return StableDiffusion3Pipeline.from_pretrained(pristine, transformer=None, vae=None)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_any_text_is_encoded_as_in_diffusers(
    encoders: dict[str, Model], pipeline: Any, prompt: str
) -> None:
    with torch.no_grad():
        for index, name in enumerate(("text_encoder", "text_encoder_2")):
            ours = encoders[name].run("encode", {"text": prompt})
            embeds, pooled = pipeline._get_clip_prompt_embeds([prompt], clip_model_index=index)
            assert torch.equal(ours["embeds"], embeds)
            assert torch.equal(ours["pooled"], pooled)
        ours = encoders["text_encoder_3"].run("encode", {"text": prompt, "max_length": 160})
        theirs = pipeline._get_t5_prompt_embeds([prompt], max_sequence_length=160)
        assert torch.equal(ours["embeds"], theirs)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_a_prompt_is_refused_rather_than_cut(
    encoders: dict[str, Model], without_t5: dict[str, Model], name: str
) -> None:
    encoders = encoders | without_t5
    limit = 16 if name == "text_encoder_3" else 77
    rest = {"max_length": limit} if name == "text_encoder_3" else {}
    special = 1 if name == "text_encoder_3" else 2
    fits = " ".join(["a"] * (limit - special))
    encoders[name].run("encode", {"text": fits} | rest)
    with pytest.raises(InvalidInput) as failure:
        encoders[name].run("encode", {"text": fits + " a"} | rest)
    assert (failure.value.field, failure.value.reason) == ("text", "PromptTooLong")
    assert f"{limit + 1} tokens" in failure.value.message
    assert f"takes {limit}" in failure.value.message


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_a_clip_beside_a_t5_says_that_it_reads_the_beginning(
    encoders: dict[str, Model], name: str
) -> None:
    fits = " ".join(["a"] * 75)
    assert not encoders[name].run("encode", {"text": fits})["warnings"]
    (warning,) = encoders[name].run("encode", {"text": fits + " a"})["warnings"]
    assert "78 CLIP tokens" in warning
    assert "the first 77" in warning


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "text"),
        ({"text": 3}, "text"),
        ({"text": "a", "max_length": 0}, "max_length"),
        ({"text": "a", "max_length": 513}, "max_length"),
        ({"text": "a", "max_length": True}, "max_length"),
        ({"text": "a", "max_length": "9"}, "max_length"),
    ],
)
def test_a_wrong_input_is_named(
    encoders: dict[str, Model], given: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInput) as failure:
        encoders["text_encoder_3"].run("encode", given)
    assert failure.value.field == field
