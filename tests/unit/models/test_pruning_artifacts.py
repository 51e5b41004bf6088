# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A pruning artifact is taken whole and with its own transformer, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_artifacts import make_artifact
from small_pipelines import make_sd3

from kubediffusion import api, artifacts, models, sources
from kubediffusion.errors import InvalidInput, InvalidWorkflow, UnsupportedModel
from kubediffusion.models.base import LoadSpec
from kubediffusion.node.library import Library
from kubediffusion.resolving import look_up
from kubediffusion.v1alpha1 import node_pb2
from shiva_kernels import artifact as shiva

SpecOf = Callable[..., LoadSpec]


@pytest.fixture(scope="module")
def artifact(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(pristine, tmp_path_factory.mktemp("artifact"))


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copied"
    folder.mkdir()
    for file in artifact.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def fetched(pipeline: Path, folder: Path) -> Path | None:
    """As a node fetches it."""
    spec = node_pb2.ModelSpec(
        identity="t",
        family="sd3",
        component="transformer",
        uri=f"file://{pipeline}",
        subfolder="transformer",
        options={"pruning_uri": f"file://{folder}"},
    )
    return Library(models.family, sources.open).fetch(spec, lambda *_: None).pruning_path


def test_the_files_have_the_librarys_names() -> None:
    assert (artifacts.MANIFEST, artifacts.WEIGHTS) == (shiva.JSON_NAME, shiva.WEIGHTS_NAME)


def test_what_a_transformer_with_an_artifact_tells(
    pristine: Path, artifact: Path, spec_of: SpecOf
) -> None:
    own = models.load(spec_of(pristine, "transformer"))
    pruned = models.load(spec_of(pristine, "transformer", pruning_path=artifact))
    assert "budgets" not in own.facts
    assert pruned.facts["budgets"] == "0.8,0.6,0.4"
    assert pruned.facts["blocks"] == 3
    assert pruned.nbytes > own.nbytes
    pruned.unload()


def test_budgets_need_an_artifact_and_one_of_its_tables(
    pristine: Path, artifact: Path, spec_of: SpecOf
) -> None:
    inputs = {
        **{f"prompt_{i}.embeds": torch.zeros(1, 7, w) for i, w in ((1, 32), (2, 48))},
        **{f"prompt_{i}.pooled": torch.zeros(1, w) for i, w in ((1, 32), (2, 48))},
        "guidance": 1.0,
        "max_sequence_length": 8,
        "seed": 1,
        "steps": 2,
        "width": 32,
        "height": 32,
    }
    own = models.load(spec_of(pristine, "transformer"))
    pruned = models.load(spec_of(pristine, "transformer", pruning_path=artifact))
    for model, budget, text in ((own, 0.6, "no pruning artifact"), (pruned, 0.5, "0.8, 0.6, 0.4")):
        with pytest.raises(InvalidInput, match=text) as info:
            model.start(inputs, budget=budget)
        assert info.value.field == "budget"
    assert pruned.start(inputs, budget=0.6).pruning.row(1.0) is not None
    assert pruned.start(inputs).pruning.row(1.0) is None


def test_only_a_transformer_is_pruned_or_compiled_and_in_one_way(
    pristine: Path, artifact: Path, spec_of: SpecOf
) -> None:
    for field, options in (
        ("pruning", {"pruning_path": artifact}),
        ("compile", {"options": {"compile": "default"}}),
    ):
        with pytest.raises(UnsupportedModel, match="its transformer can") as info:
            models.load(spec_of(pristine, "vae", **options))
        assert info.value.field == field
    with pytest.raises(UnsupportedModel, match="no mode of compiling"):
        models.load(spec_of(pristine, "transformer", options={"compile": "max-autotune"}))


def test_an_artifact_of_other_weights_is_refused(
    artifact: Path, spec_of: SpecOf, tmp_path: Path
) -> None:
    make_sd3(tmp_path / "other", seed=9)
    with pytest.raises(UnsupportedModel, match=r"does not belong.*other weights") as info:
        models.load(spec_of(tmp_path / "other", "transformer", pruning_path=artifact))
    assert (info.value.field, info.value.reason) == ("pruning.artifact", "WrongArchitecture")


def test_an_artifact_of_another_architecture_is_refused(
    artifact: Path, spec_of: SpecOf, tmp_path: Path
) -> None:
    make_sd3(tmp_path / "other", version="3.5")
    with pytest.raises(UnsupportedModel, match="the artifact was made for dual_attention_layers"):
        models.load(spec_of(tmp_path / "other", "transformer", pruning_path=artifact))


def test_a_pickle_is_never_loaded(pristine: Path, copied: Path) -> None:
    (copied / "shiva.safetensors").unlink()
    torch.save({}, copied / "shiva.pt")
    with pytest.raises(UnsupportedModel, match=r"no shiva\.safetensors; shiva\.pt could run code"):
        fetched(pristine, copied)


def test_what_is_no_artifact_says_what_one_is(pristine: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"pruning artifact: it has no shiva\.json") as info:
        fetched(pristine, tmp_path)
    assert info.value.reason == "WrongArchitecture"


def test_torn_and_exchanged_weights_are_refused(
    pristine: Path, copied: Path, spec_of: SpecOf
) -> None:
    weights = copied / "shiva.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnsupportedModel, match="no whole safetensors file"):
        fetched(pristine, copied)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UnsupportedModel, match="not the file that") as info:
        models.load(spec_of(pristine, "transformer", pruning_path=copied))
    assert info.value.reason == "BadWeights"


@pytest.mark.parametrize("change", ['{"format": 9}', "[]", "{", '{"format": 1}'])
def test_a_manifest_that_cannot_be_read_is_said_so(
    change: str, pristine: Path, copied: Path, spec_of: SpecOf
) -> None:
    (copied / "shiva.json").write_text(change)
    with pytest.raises(UnsupportedModel, match="the pruning artifact cannot be read") as info:
        models.load(spec_of(pristine, "transformer", pruning_path=copied))
    assert info.value.reason == "BadWeights"


# ---------------------------------------------------------------- before anything is loaded


def looked_up(pipeline: Path, folder: Path, budget: str = "0.6") -> None:
    pruning = {"artifact": {"uri": f"file://{folder}"}, "budget": budget}
    text = json.dumps(
        {
            "apiVersion": "kubediffusion.io/v1alpha1",
            "kind": "DiffusionWorkflow",
            "metadata": {"name": "w"},
            "spec": {
                "pipeline": {
                    "preset": "StableDiffusion3",
                    "source": {"uri": f"file://{pipeline}"},
                },
                "models": {"transformer": {"pruning": pruning}},
            },
        }
    )
    look_up(api.load_workflow(text))


def test_a_default_budget_that_the_artifact_lacks_is_seen_with_the_workflow(
    pristine: Path, artifact: Path
) -> None:
    looked_up(pristine, artifact)
    looked_up(pristine, artifact, "1")
    with pytest.raises(InvalidWorkflow, match=r"it has 1, 0\.8, 0\.6, 0\.4") as info:
        looked_up(pristine, artifact, "0.5")
    assert info.value.field == "spec.models.transformer.pruning.budget"


def test_a_source_without_an_artifact_is_seen_with_the_workflow(
    pristine: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match="is no pruning artifact") as info:
        looked_up(pristine, tmp_path)
    assert info.value.field == "spec.models.transformer.pruning.artifact"
