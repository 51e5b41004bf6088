# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""docs/openai.md, the code and the installed `openai` package agree on every field.

A release of the package with a new parameter fails here, until somebody decides what it means.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from openai.types import image_edit_params, image_generate_params

from kubediffusion.gateway.http import HttpLimits
from kubediffusion.gateway.openai.fields import (
    IGNORED,
    REFUSED,
    EditFields,
    GenerationFields,
    ImageFields,
)

DOCS = Path(__file__).parents[3] / "docs" / "openai.md"

ENDPOINTS = {
    "generations": (
        GenerationFields,
        image_generate_params.ImageGenerateParamsBase,
        image_generate_params.ImageGenerateParamsStreaming,
    ),
    "edits": (
        EditFields,
        image_edit_params.ImageEditParamsBase,
        image_edit_params.ImageEditParamsStreaming,
    ),
}


def _table(heading: str) -> list[list[str]]:
    """The cells of the rows of the table under a heading."""
    section = DOCS.read_text().partition(f"\n### {heading}\n")[2].partition("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def _documented(endpoint: str) -> dict[str, str]:
    """What the docs say of each of OpenAI's fields."""
    column = 1 + list(ENDPOINTS).index(endpoint)
    rows = {row[0]: row[column] for row in _table("Fields of OpenAI's")}
    return {field: what for field, what in rows.items() if what != "–"}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_docs_have_every_parameter_of_the_package_and_no_other(endpoint):
    _, base, streaming = ENDPOINTS[endpoint]
    parameters = {*base.__annotations__, *streaming.__annotations__}
    assert set(_documented(endpoint)) == parameters


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_code_takes_the_fields_of_the_docs_and_no_other(endpoint):
    fields = ENDPOINTS[endpoint][0]
    documented = _documented(endpoint)
    ours = {row[0] for row in _table("Fields of ours")}
    assert set(fields.model_fields) == set(documented) | ours
    for name, what in documented.items():
        expected = "ignored" if name in IGNORED else "refused" if name in REFUSED else "honoured"
        assert (name, what) == (name, expected)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_fields_are_refused(name):
    fields = next(f for f in (GenerationFields, EditFields) if name in f.model_fields)
    with pytest.raises(ValueError, match=re.escape(REFUSED[name])):
        fields.model_validate({"prompt": "x", "image": b"1", name: 1})


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_ignored_fields_are_listed_whatever_they_hold(name):
    fields = next(f for f in (GenerationFields, EditFields) if name in f.model_fields)
    image = {"image": b"1"} if fields is EditFields else {}
    assert fields.model_validate({"prompt": "x", name: ["?"]} | image).ignored == [name]


def test_nothing_is_ignored_or_refused_that_no_endpoint_knows():
    known = {*GenerationFields.model_fields, *EditFields.model_fields}
    assert {*IGNORED, *REFUSED} <= known
    assert not {*IGNORED} & {*REFUSED}
    assert set(ImageFields.model_fields) <= known


def test_the_limits_of_the_docs_are_those_of_the_code():
    text = " ".join(DOCS.read_text().split())
    limits = HttpLimits()
    assert f"A body may have {limits.body_bytes >> 20} MiB" in text
    assert f"have {limits.bodies_bytes >> 20} MiB together" in text
    assert f"up to {limits.store_bytes >> 20} MiB in all" in text
    assert limits.store_seconds == 3600
    assert f"every {limits.stream.keepalive_seconds:g} seconds" in text


def test_the_python_of_the_docs_is_python():
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)
