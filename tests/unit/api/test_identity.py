# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""An identity changes with the arithmetic and with nothing else."""

from __future__ import annotations

import re
from dataclasses import fields, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from kubediffusion.api import Arithmetic, identity, load_workflow
from kubediffusion.workflow import PipelineIndex, resolve

BASE = Arithmetic("sd3", "transformer", "hf://org/name", "abc", "transformer")
WORD = st.text("abcdefghij0123456789", min_size=1, max_size=12)

INDEX = PipelineIndex(
    {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
    },
    "0123abcd",
)


def workflow(
    name: str = "w",
    dtype: str = "float32",
    uri: str = "hf://org/name",
    lora: str = "ink",
    scale: str = "0",
    steps: int = 20,
    replicas: int = 1,
    numerics: str = "exact",
) -> str:
    return f"""
apiVersion: kubediffusion.io/v1alpha1
kind: DiffusionWorkflow
metadata: {{name: {name}}}
spec:
  pipeline: {{preset: StableDiffusion3, dtype: {dtype}, source: {{uri: "{uri}"}}}}
  numerics: {numerics}
  loras: [{{name: {lora}, source: {{uri: "hf://org/lora"}}, scale: "{scale}"}}]
  models: {{transformer: {{scaling: {{maxReplicas: {replicas}}}}}}}
  inputs: {{steps: {{default: {steps}}}}}
"""


def identities(text: str, index: PipelineIndex = INDEX) -> dict[str, str]:
    models = resolve(load_workflow(text), index).models
    return {role: model.identity for role, model in models.items()}


@given(st.data())
@settings(max_examples=60)
def test_each_field_of_the_arithmetic_counts(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([f.name for f in fields(Arithmetic)]))
    before = getattr(BASE, name)
    after = (not before) if isinstance(before, bool) else data.draw(WORD)
    changed = replace(BASE, **{name: after})
    assert (identity(changed) == identity(BASE)) == (changed == BASE)


@given(
    name=st.from_regex(r"[a-z]{1,10}", fullmatch=True),
    lora=st.from_regex(r"[a-z]{1,10}", fullmatch=True),
    scale=st.sampled_from(["0", "0.5", "-1.25"]),
    steps=st.integers(1, 1000),
    replicas=st.integers(1, 1000),
    numerics=st.sampled_from(["exact", "fast"]),
)
@settings(max_examples=15, deadline=None)
def test_how_a_model_is_served_and_used_does_not_count(
    name: str, lora: str, scale: str, steps: int, replicas: int, numerics: str
) -> None:
    # Quoted: `on` and `no` are truth values in YAML.
    text = workflow(f"'{name}'", "float32", "hf://org/name", f"'{lora}'", scale, steps, replicas)
    assert identities(text.replace("exact", numerics)) == identities(workflow())


def test_dtype_source_and_commit_count() -> None:
    base = identities(workflow())
    others = [
        identities(workflow(dtype="bfloat16")),
        identities(workflow(uri="hf://org/other")),
        identities(workflow(), PipelineIndex(INDEX.components, "4567")),
    ]
    for other in others:
        assert all(other[role] != base[role] for role in base)


def test_a_branch_and_the_commit_it_points_to_are_one_identity() -> None:
    branch = workflow().replace('"hf://org/name"', '"hf://org/name", revision: main', 1)
    assert identities(branch) == identities(workflow())


@given(uri=WORD, component=st.text(max_size=60))
@settings(max_examples=50)
def test_an_identity_is_a_dns_label(uri: str, component: str) -> None:
    text = identity(replace(BASE, uri=f"hf://o/{uri}", component=component))
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", text)
    assert len(text) <= 40


def test_an_identity_stays_what_it_was() -> None:
    """Names of objects in clusters hang on it: a change here is a migration."""
    assert identity(BASE) == "transformer-677f7f6ca3de5e360fde"


def test_slashes_at_the_end_or_doubled_are_one_source() -> None:
    assert identity(replace(BASE, uri="hf://org//name/")) == identity(BASE)
