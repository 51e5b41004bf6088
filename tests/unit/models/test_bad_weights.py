# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A component loads whole and as what it claims to be, or says what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kubediffusion import models
from kubediffusion.errors import UnsupportedModel
from kubediffusion.models.base import LoadSpec

SpecOf = Callable[..., LoadSpec]
COMPONENTS = ("text_encoder", "text_encoder_3", "transformer", "vae", "controlnet")
each_component = pytest.mark.parametrize("component", COMPONENTS)


def refusal(spec: LoadSpec) -> UnsupportedModel:
    with pytest.raises(UnsupportedModel) as failure:
        models.load(spec)
    return failure.value


def weights_of(spec: LoadSpec) -> Path:
    [file] = spec.path.glob("*.safetensors")
    return file


def change(spec: LoadSpec, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = weights_of(spec)
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def largest(tensors: dict[str, torch.Tensor]) -> str:
    return max(tensors, key=lambda name: (tensors[name].ndim, tensors[name].numel(), name))


@each_component
def test_whole_components_load(pristine: Path, spec_of: SpecOf, component: str) -> None:
    model = models.load(spec_of(pristine, component, dtype="bfloat16"))
    assert model.nbytes > 0
    assert model.facts
    model.unload()


@each_component
def test_pickles_are_never_loaded(pipeline: Path, spec_of: SpecOf, component: str) -> None:
    spec = spec_of(pipeline, component)
    weights_of(spec).unlink()
    (spec.path / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n")
    error = refusal(spec)
    assert error.reason == "NotSafetensors"
    for part in (str(spec.path), "pytorch_model.bin", "safe_serialization=True"):
        assert part in error.message


def test_a_folder_without_weights_says_so(pipeline: Path, spec_of: SpecOf) -> None:
    spec = spec_of(pipeline, "vae")
    weights_of(spec).unlink()
    error = refusal(spec)
    assert (error.reason, "no weights" in error.message) == ("NotSafetensors", True)


@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
@pytest.mark.parametrize("how", ["cut", "empty", "header", "not at all"])
def test_torn_weights_are_told(pipeline: Path, spec_of: SpecOf, component: str, how: str) -> None:
    spec = spec_of(pipeline, component)
    file = weights_of(spec)
    data = file.read_bytes()
    torn = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "header": b"\xff" * 8 + data[8:],
        "not at all": b"<!DOCTYPE html><html>404</html>",
    }[how]
    file.write_bytes(torn)
    error = refusal(spec)
    assert error.reason == "BadWeights"
    assert file.name in error.message
    assert "fetch it again" in error.message


def test_a_torn_config_is_told_from_a_missing_one(pipeline: Path, spec_of: SpecOf) -> None:
    spec = spec_of(pipeline, "transformer")
    (spec.path / "config.json").write_text('{"_class_name": "SD3Tr')
    assert refusal(spec).reason == "BadWeights"
    (spec.path / "config.json").unlink()
    error = refusal(spec)
    assert error.reason == "WrongArchitecture"
    assert "no config.json" in error.message


@each_component
def test_another_class_is_refused_by_name(pipeline: Path, spec_of: SpecOf, component: str) -> None:
    spec = spec_of(pipeline, component)
    file = spec.path / "config.json"
    config = json.loads(file.read_text())
    config.pop("_class_name", None)
    config.pop("architectures", None)
    file.write_text(json.dumps(config | {"_class_name": "FluxTransformer2DModel"}))
    error = refusal(spec)
    assert error.reason == "WrongArchitecture"
    assert "FluxTransformer2DModel" in error.message
    assert f"as its {component}" in error.message


@each_component
def test_a_missing_weight_is_never_drawn_at_random(
    pipeline: Path, spec_of: SpecOf, component: str
) -> None:
    spec = spec_of(pipeline, component)
    gone: list[str] = []

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        gone.append(largest(tensors))
        del tensors[gone[0]]

    change(spec, edit)
    error = refusal(spec)
    assert error.reason == "WrongArchitecture"
    assert str(spec.path) in error.message


@each_component
def test_a_weight_too_many_is_refused(pipeline: Path, spec_of: SpecOf, component: str) -> None:
    spec = spec_of(pipeline, component)
    change(spec, lambda tensors: tensors.update(surplus=torch.zeros(2)))
    error = refusal(spec)
    assert error.reason == "WrongArchitecture"
    assert "surplus" in error.message


@each_component
def test_a_weight_of_another_shape_is_refused(
    pipeline: Path, spec_of: SpecOf, component: str
) -> None:
    spec = spec_of(pipeline, component)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = largest(tensors)
        tensors[name] = torch.cat([tensors[name], tensors[name]])

    change(spec, edit)
    assert refusal(spec).reason == "WrongArchitecture"


def test_an_unknown_dtype_names_those_there_are(pristine: Path, spec_of: SpecOf) -> None:
    error = refusal(spec_of(pristine, "vae", dtype="int4"))
    assert error.reason == "UnsupportedDType"
    assert error.field == "dtype"
    assert "float32, bfloat16, float16" in error.message


def test_a_variant_is_loaded_where_it_is_and_told_where_it_is_not(
    pipeline: Path, spec_of: SpecOf
) -> None:
    spec = spec_of(pipeline, "vae", variant="fp16")
    error = refusal(spec)
    assert error.field == "variant"
    assert "'fp16'" in error.message
    file = weights_of(spec)
    file.rename(file.with_suffix(".fp16.safetensors"))
    models.load(spec)


def test_a_variant_in_several_files_is_loaded(pipeline: Path, spec_of: SpecOf) -> None:
    spec = spec_of(pipeline, "vae", variant="fp16")
    file = weights_of(spec)
    part = file.with_name("diffusion_pytorch_model.fp16-00001-of-00001.safetensors")
    file.rename(part)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(part), part.name)}
    name = "diffusion_pytorch_model.safetensors.index.fp16.json"
    (spec.path / name).write_text(json.dumps(index))
    models.load(spec)


def test_the_vae_of_another_family_is_refused(pipeline: Path, spec_of: SpecOf) -> None:
    spec = spec_of(pipeline, "vae")
    file = spec.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift_factor": None}))
    assert "shift_factor" in refusal(spec).message


def test_a_missing_tokenizer_says_where_it_should_be(pipeline: Path, spec_of: SpecOf) -> None:
    for component, folder in (("text_encoder_2", "tokenizer_2"), ("text_encoder_3", "tokenizer_3")):
        shutil.rmtree(pipeline / folder)
        assert str(pipeline / folder) in refusal(spec_of(pipeline, component)).message


def test_a_scheduler_of_another_kind_is_refused(pipeline: Path, spec_of: SpecOf) -> None:
    file = pipeline / "scheduler/scheduler_config.json"
    file.write_text('{"_class_name": "DDIMScheduler"}')
    assert "DDIMScheduler" in refusal(spec_of(pipeline, "transformer")).message
    file.unlink()
    assert "scheduler_config.json" in refusal(spec_of(pipeline, "transformer")).message


def test_an_unknown_family_and_component_name_those_there_are(
    pristine: Path, spec_of: SpecOf
) -> None:
    assert "sd3" in refusal(LoadSpec("", "flux", "vae", pristine, pristine)).message
    assert "controlnet" in refusal(spec_of(pristine, "unet")).message
