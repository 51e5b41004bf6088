# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The language of conditions: what it says, what it refuses, and that it never runs anything."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubediffusion.errors import InvalidWorkflow
from kubediffusion.workflow.expression import Fact, MissingFactError, parse
from kubediffusion.workflow.values import InputType

INPUTS = {
    "n": InputType.INTEGER,
    "x": InputType.NUMBER,
    "word": InputType.TEXT,
    "on": InputType.FLAG,
    "image": InputType.IMAGE,
    "control.my-edges": InputType.IMAGE,
}
KNOWN = {"size": Fact(InputType.INTEGER), "zero": Fact(InputType.FLAG, default=False)}
ROLES = frozenset({"vae", "controlnet.a"})
VALUES = {"n": 3, "x": 1.5, "word": "hi", "on": True, "control.my-edges": b"x"}
FACTS = {"vae": {"size": 8}}


def evaluate(text: str, values: dict[str, object] | None = None) -> object:
    given_values = VALUES if values is None else values
    return parse(text, INPUTS, KNOWN, ROLES).evaluate(given_values, FACTS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$inputs.n > 2", True),
        ("$inputs.n > 2 and $inputs.x <= 1", False),
        ("$inputs.image or $inputs.word", True),
        ("not $inputs.image", True),
        ("$inputs.control.my-edges and $inputs.on", True),
        ("$inputs.word == 'hi'", True),
        ('$inputs.word != "$inputs.n"', True),
        ("2 if $inputs.x > 1 else 1", 2),
        ("$inputs.n * $facts.vae.size + 1", 25),
        ("-$inputs.n - -1", -2),
        ("$facts.controlnet.a.zero", False),
        ("$inputs.on == False", False),
        ("not ($inputs.n == 3 or $inputs.n == 4)", False),
    ],
)
def test_what_an_expression_says(text: str, expected: object) -> None:
    found = evaluate(text)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("text", ["$inputs.n > 0", "$inputs.n < 0", "$inputs.n == 0"])
def test_what_is_absent_compares_to_nothing(text: str) -> None:
    assert evaluate(text, {}) is False


def test_an_empty_text_is_as_good_as_absent() -> None:
    assert evaluate("not $inputs.word", {"word": ""}) is True


def test_a_fact_without_a_default_is_waited_for() -> None:
    expression = parse("$facts.vae.size", INPUTS, KNOWN, ROLES)
    with pytest.raises(MissingFactError):
        expression.evaluate({}, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("$inputs.imag", "did you mean image"),
        ("$facts.vea.size", "did you mean vae"),
        ("$facts.vae.sizes", "did you mean size"),
        ("n > 1", r"write \$inputs.n"),
        ("true", "write True"),
        ("__import__('os')", "only literals"),
        ("().__class__", "only literals"),
        ("$inputs.word.upper()", "only literals"),
        ("[1 for _ in 'ab']", "only literals"),
        ("(x := 1)", "only literals"),
        ("lambda: 1", "only literals"),
        ("f'{$inputs.n}'", "cannot be read"),
        ("2 ** 9", "only"),
        ("$inputs.n / 2", "only"),
        ("'a' * 9", "is no number"),
        ("1 < $inputs.n < 3", "compare two things"),
        ("$inputs.word < 'x'", "cannot be compared"),
        ("$inputs.n == 'three'", "cannot be compared"),
        ("$inputs.image == 1", "cannot be compared"),
        ("1 and 2", "no truth value"),
        ("1 if $inputs.n else 'a'", "one type"),
        ("None", "a literal is"),
        ("b'x'", "a literal is"),
        ("9" * 30, "out of range"),
        ("$inputs.n >", "cannot be read"),
        ("", "cannot be read"),
        ("__reference_0", "reserved"),
        ("(" * 300 + ")" * 300, "cannot be read"),
        ("-" * 4000 + "1", "cannot be read"),
        ("1 " * 3000, "longer than"),
    ],
)
def test_what_an_expression_may_not_say(text: str, words: str) -> None:
    with pytest.raises(InvalidWorkflow, match=words):
        evaluate(text)


ATOMS = st.sampled_from(
    ["$inputs.n", "$inputs.x", "$inputs.image", "$facts.vae.size", "1", "2.5", "'a'", "True", "os"]
)
JOINTS = st.sampled_from(
    [" and ", " or ", " == ", " < ", " + ", " * ", " if 1 else ", ".", "(", ")"]
)


@given(st.lists(st.tuples(ATOMS, JOINTS), max_size=6).map(lambda p: "".join(a + j for a, j in p)))
@settings(max_examples=200, deadline=None)
def test_any_mix_of_words_is_evaluated_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidWorkflow):
        expression = parse(text, INPUTS, KNOWN, ROLES)
        expression.evaluate({}, FACTS)
        expression.evaluate(VALUES, FACTS)


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_evaluated_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidWorkflow):
        parse(text, INPUTS, KNOWN, ROLES).evaluate({}, FACTS)
