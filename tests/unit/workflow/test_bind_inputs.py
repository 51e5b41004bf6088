# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A request's inputs: what is taken, what is completed, and what is refused by name."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sd3_case import FACTS, LORAS, controls, resolved

from kubediffusion.errors import InvalidInput
from kubediffusion.workflow import bind, seed_from_key

WORKFLOW = resolved(controls("ab") + LORAS + "  inputs: {steps: {maximum: 50, default: 20}}\n")


def refused(inputs: dict[str, object], loras: dict[str, float] | None = None) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        bind(WORKFLOW, {"prompt": "x", **inputs}, loras, FACTS)
    return caught.value


def test_defaults_complete_a_request() -> None:
    values = dict(bind(WORKFLOW, {"prompt": "x"}, {}, FACTS, seed=9).values)
    assert values == {
        "prompt": "x",
        "negative_prompt": "",
        "width": 128,
        "height": 128,
        "steps": 20,
        "guidance": 7.0,
        "seed": 9,
        "max_sequence_length": 256,
    }


def test_a_prompt_is_required() -> None:
    with pytest.raises(InvalidInput, match=r"inputs\.prompt: is required"):
        bind(WORKFLOW, {}, {}, FACTS)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("promt", "x", "did you mean prompt"),
        ("prompt", 3, "must be text, not a whole number"),
        ("prompt", b"x", "must be text"),
        ("prompt", "a\x00b", "U+0000"),
        ("prompt", "a\ud800", "U+D800"),
        ("prompt", "x" * 10_001, "at most 10000"),
        ("steps", True, "must be a whole number, not a flag"),
        ("steps", 20.0, "must be a whole number, not a number"),
        ("steps", "20", "must be a whole number, not text"),
        ("steps", 0, "1 to 50"),
        ("steps", 51, "1 to 50"),
        ("steps", 10**30, "64-bit"),
        ("guidance", math.nan, "no usable number"),
        ("guidance", math.inf, "no usable number"),
        ("guidance", -1, "0 to 100"),
        ("guidance", "7", "must be a number"),
        ("guidance", False, "must be a number"),
        ("seed", -1, "out of bounds"),
        ("seed", 2**63, "64-bit"),
        ("width", 100, "not a multiple of 16; 96 is the nearest"),
        ("height", 8, "not a multiple of 16; 16 is the nearest"),
        ("width", 208, "at most 192"),
        ("height", -16, "1 to 16384"),
        ("max_sequence_length", 513, "1 to 512"),
        ("image", b"", "is empty"),
        ("image", "/etc/passwd", "must be the bytes"),
        ("image", b"x" * (32 << 20) + b"x", "at most 33554432"),
        ("strength", 0.5, "means nothing without image"),
        ("control.a.scale", 0.5, "means nothing without control.a"),
        ("control.c", b"x", "did you mean control."),
    ],
)
def test_each_wrong_input_is_named(name: str, value: object, words: str) -> None:
    found = refused({name: value})
    assert found.field == f"inputs.{name}"
    assert words in found.message


@pytest.mark.parametrize(
    ("inputs", "field", "words"),
    [
        ({"image": b"x", "strength": 1.5}, "strength", "0 to 1"),
        ({"image": b"x", "strength": 0.0}, "strength", "leaves no step"),
        ({"control.a": b"x", "control.a.scale": 11}, "control.a.scale", "-10 to 10"),
        (
            {"control.a": b"x", "control.a.start": 0.5, "control.a.end": 0.5},
            "control.a.start",
            "not below control.a.end",
        ),
        ({"control.a": b"x", "control.a.start": 1.0}, "control.a.start", "not below"),
    ],
)
def test_inputs_that_do_not_go_together(inputs: dict[str, object], field: str, words: str) -> None:
    found = refused(inputs)
    assert found.field == f"inputs.{field}"
    assert words in found.message


@pytest.mark.parametrize(
    ("name", "scale", "words"),
    [
        ("inc", 1.0, "did you mean ink"),
        ("ink", math.nan, "out of bounds"),
        ("ink", 10.5, "out of bounds"),
        ("ink", True, "must be a number"),
    ],
)
def test_each_wrong_lora_is_named(name: str, scale: float, words: str) -> None:
    found = refused({}, {name: scale})
    assert found.field == f"loras.{name}"
    assert words in found.message


def test_whole_numbers_are_numbers_and_line_breaks_are_text() -> None:
    bound = bind(WORKFLOW, {"prompt": "a\n\tb é 🙂", "guidance": 4}, {}, FACTS)
    assert bound.values["guidance"] == 4.0
    assert isinstance(bound.values["guidance"], float)
    assert bound.values["prompt"] == "a\n\tb é 🙂"


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
def test_an_image_is_bytes_of_any_kind(make: type) -> None:
    assert (
        bind(WORKFLOW, {"prompt": "x", "image": make(b"png")}, {}, FACTS).values["image"] == b"png"
    )


def test_the_smallest_strength_runs_one_step() -> None:
    bound = bind(WORKFLOW, {"prompt": "x", "image": b"x", "strength": 0.01}, {}, FACTS)
    assert bound.values["strength"] == 0.01


def test_without_facts_sizes_are_left_to_the_nodes() -> None:
    values = bind(WORKFLOW, {"prompt": "x", "width": 100, "height": 100}, {}, {}).values
    assert values["width"] == 100


def test_a_key_gives_its_seed_again() -> None:
    assert seed_from_key("k") == seed_from_key("k") != seed_from_key("l")
    assert 0 <= seed_from_key("\ud800") < 2**32


ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.lists(st.integers(), max_size=2)
)


@given(
    st.dictionaries(st.sampled_from(sorted(WORKFLOW.inputs)) | st.text(max_size=8), ANYTHING),
    st.dictionaries(st.sampled_from(["ink", "wash", "x"]), st.floats() | st.booleans()),
)
@settings(max_examples=150, deadline=None)
def test_any_request_is_bound_whole_or_refused(
    inputs: dict[str, object], loras: dict[str, float]
) -> None:
    with contextlib.suppress(InvalidInput):
        bound = bind(WORKFLOW, inputs, loras, FACTS)
        for name, value in bound.values.items():
            spec = WORKFLOW.inputs[name]
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                assert math.isfinite(value)
                assert spec.minimum is None or value >= spec.minimum
                assert spec.maximum is None or value <= spec.maximum
            assert not spec.requires or spec.requires in bound.values
        assert bound.values["width"] % 16 == 0
        # What was bound binds to itself.
        assert bind(WORKFLOW, bound.values, loras, FACTS) == bound
