# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""docs/resources.md says of the custom resources what the types and the operator's code say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from kubediffusion.api import DiffusionWorkflow, load, model, schema, types
from kubediffusion.api.identity import Arithmetic
from kubediffusion.api.load import bare_type
from kubediffusion.api.serving import ModelOverride
from kubediffusion.api.types import Metadata, Resource
from kubediffusion.errors import InvalidWorkflow
from kubediffusion_operator.planning import names, sharing
from kubediffusion_operator.planning.cache import PlanCache
from kubediffusion_operator.planning.models import identity_of
from tests.unit.docs.pages import ROOT, after, blocks, codes, section, table, without_links

PAGE = (ROOT / "docs/resources.md").read_text()

# ---------------------------------------------------------------- fields

# What the patterns of texts are called; the page says what they mean.
WORDS = {
    types.ObjectName: "object name",
    types.PartName: "part name",
    types.DottedName: "dotted name",
    types.Uri: "uri",
    types.RelativePath: "path",
    types.Revision: "revision",
    types.Variant: "word",
    types.Quantity: "quantity",
    types.Decimal: "decimal",
    types.SignedDecimal: "signed decimal",
}


def _pattern(annotated: Any) -> str:
    (info,) = get_args(annotated)[1:]
    return next(m.pattern for m in info.metadata if getattr(m, "pattern", None))


PATTERNS = {_pattern(annotated): word for annotated, word in WORDS.items()} | {
    r"^[a-z0-9_]*$": "word",
    r"^[A-Za-z0-9_]*$": "word",
    r"^([0-9]+(\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?)?$": "quantity",
}


def words(field: Mapping[str, Any], kind: Any) -> str:
    """Type and bounds of a field, from its schema in the CRD."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.__name__
    if "enum" in field:
        return ", ".join(f"`{each}`" for each in field["enum"])
    match field.get("type"):
        case "array":
            text = f"list of {words(field['items'], bare_type(get_args(kind)[0]))}"
            keys = field.get("x-kubernetes-list-map-keys", ())
            text += "".join(f" by `{key}`" for key in keys)
            return text + _bounds(field, "minItems", "maxItems")
        case "object" if "additionalProperties" in field:
            inner = words(field["additionalProperties"], bare_type(get_args(kind)[-1]))
            return f"map to {inner}" + _bounds(field, "minProperties", "maxProperties")
        case "object":
            return "object"
        case "string":
            return _text(field)
        case "integer" | "number" as number:
            return number + _bounds(field, "minimum", "maximum")
        case "boolean":
            return "`true`, `false`"
        case _:
            assert field.get(schema.PRESERVE), field
            return "any value"


def _text(field: Mapping[str, Any]) -> str:
    if field.get("format") == "date-time":
        return "time"
    word = PATTERNS[field["pattern"]] if "pattern" in field else "text"
    # The lengths of what has a name of its own stand with the name.
    named = word not in ("text", "word", "path", "revision")
    return word if named else word + _bounds(field, "minLength", "maxLength")


def _bounds(field: Mapping[str, Any], least: str, most: str) -> str:
    low, high = field.get(least, 0 if "Length" in least else None), field.get(most)
    if low and high is not None:
        return f", {low} to {high}"
    if low is not None and high is not None and "imum" in least:
        return f", {low} to {high}"
    if high is not None:
        return f", up to {high}"
    return f", at least {low}" if low is not None and "imum" in least else ""


def tables(kind: type[BaseModel], found: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(type's name, [field, type, default]) of a type and of all that it is made of."""
    for name, info in kind.model_fields.items():
        key = info.alias or name
        field = found["properties"][key]
        inner = bare_type(info.annotation)
        if key in found.get("required", ()):
            default = "required"
        else:
            default = f"`{_plain(field['default'])}`" if "default" in field else "–"
        if inner is not Metadata and key not in ("apiVersion", "kind"):
            yield kind.__name__, [key, words(field, inner), default]
        yield from _inner(inner, field)


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _inner(kind: Any, field: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    if isinstance(kind, type) and issubclass(kind, Resource):
        yield from tables(kind, field)
    elif arguments := get_args(kind):
        for key in ("items", "additionalProperties"):
            if isinstance(field.get(key), dict):
                argument = arguments[0] if key == "items" else arguments[-1]
                yield from _inner(bare_type(argument), field[key])


def of_code() -> dict[str, dict[str, tuple[str, str]]]:
    """By type and field: type with bounds, default."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for definition in schema.DEFINITIONS:
        for name, row in tables(definition.kind, schema.structural(definition.kind)):
            # A status has no defaults: what nobody said is not there. Shared types are in both.
            found.setdefault(name, {}).setdefault(row[0], (row[1], row[2]))
    kinds = [definition.kind.__name__ for definition in schema.DEFINITIONS]
    return {name: rows for name, rows in found.items() if name not in kinds}


FIELDS = of_code()


def of_page(name: str) -> dict[str, list[str]]:
    """By field: the cells of its row."""
    rows = table(after(PAGE, f"<!-- fields: {name} -->"))
    return {codes(row[0])[0]: [without_links(cell) for cell in row] for row in rows}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_there_with_its_type_and_default(name: str) -> None:
    rows = of_page(name)
    said = {field: row[1:-1] for field, row in rows.items()}
    is_status = all(len(row) == 1 for row in said.values())
    wanted = {
        field: [kind] if is_status else [kind, default]
        for field, (kind, default) in FIELDS[name].items()
    }
    missing = [
        f"| {' | '.join([f'`{field}`', *row])} | ... |"
        for field, row in wanted.items()
        if said.get(field) != row
    ]
    assert missing == [], f"rows that docs/resources.md lacks in the table of {name}"
    assert [field for field in said if field not in wanted] == [], "fields that are gone"
    assert all(row[-1] for row in rows.values()), "a field without a word on what it does"


def test_there_is_no_table_of_a_type_that_is_gone() -> None:
    assert sorted(re.findall(r"<!-- fields: (\w+) -->", PAGE)) == sorted(FIELDS)


def test_texts_with_a_pattern_are_explained() -> None:
    said = {row[0] for row in table(section(PAGE, "## Types of the fields"))}
    assert said == {*PATTERNS.values(), "time", "object", "any value"}


# ---------------------------------------------------------------- identity and sharing


def test_fields_of_the_identity_are_marked() -> None:
    for name, expected in (
        ("ModelSpec", {rule.field for rule in model.IDENTITY_RULES}),
        (
            "ModelOverride",
            {"source", "dtype", "attentionBackend", "compile", "quantization", "tiling", "pruning"},
        ),
    ):
        marked = {field for field, row in of_page(name).items() if "**identity**" in row[-1]}
        assert marked == expected


def test_every_part_of_an_identity_is_in_its_table() -> None:
    rows = table(section(PAGE, "### Identity"))
    said = {code for row in rows for code in codes(row[0])}
    assert said == {field.name for field in fields(Arithmetic)}


def test_what_the_oldest_decides_is_said() -> None:
    rows = table(section(PAGE, "### Sharing"))
    said = {code for row in rows for code in codes(row[0])}
    for name in sharing._OLDEST:
        assert ModelOverride.model_fields[name].alias in said
    assert {"scaling.minReplicas", "scaling.maxReplicas", "scaling.mode"} <= said
    assert {"scaling.targetPerReplica", "scaling.behavior"} <= said


# ---------------------------------------------------------------- rules


def test_every_rule_is_there_with_its_message() -> None:
    said = {codes(row[-1])[0] for row in table(section(PAGE, "## Rules between fields"))}
    unchanged = {rule.message: rule.message.replace(rule.field, "FIELD", 1) for rule in _OF_CHANGES}
    assert said == {unchanged.get(rule.message, rule.message) for rule in _rules()}


_OF_CHANGES = model.IDENTITY_RULES


def _rules() -> Iterator[types.Rule]:
    seen: set[type[Resource]] = set()
    todo: list[Any] = [definition.kind for definition in schema.DEFINITIONS]
    while todo:
        kind = todo.pop()
        if isinstance(kind, type) and issubclass(kind, Resource) and kind not in seen:
            seen.add(kind)
            yield from kind.rules
            todo += [bare_type(info.annotation) for info in kind.model_fields.values()]
        else:
            todo += [bare_type(each) for each in get_args(kind)]


# ---------------------------------------------------------------- as kubectl shows them


def test_names_and_columns() -> None:
    rows = table(section(PAGE, "## As kubectl shows them"))
    said = {codes(row[0])[0]: row for row in rows}
    assert set(said) == {definition.kind.__name__ for definition in schema.DEFINITIONS}
    for definition in schema.DEFINITIONS:
        _, short, columns, wide, scale = said[definition.kind.__name__]
        assert codes(short) == [definition.short]
        assert columns.split(", ") == [c.name for c in definition.columns if not c.wide]
        assert wide.split(", ") == [c.name for c in definition.columns if c.wide]
        assert (scale == "yes") == definition.scale


def test_labels_and_annotations() -> None:
    rows = table(section(PAGE, "## Labels and annotations"))
    said = {code for row in rows for code in codes(row[0])}
    ours = (names.MANAGED_BY, names.COMPONENT, names.MODEL, names.POOL, names.WORKFLOW)
    assert {*ours, names.APPLIED} == said


# ---------------------------------------------------------------- examples

EXAMPLES = [text for text in blocks(PAGE, "yaml") if text.startswith("apiVersion:")]


def test_examples_are_valid() -> None:
    kinds = {definition.kind.__name__: definition.kind for definition in schema.DEFINITIONS}
    found = [yaml.safe_load(text)["kind"] for text in EXAMPLES]
    assert set(found) == set(kinds)
    for kind, text in zip(found, EXAMPLES, strict=True):
        assert load(kinds[kind], text, "docs/resources.md") is not None


def test_a_wrong_example_would_be_noticed() -> None:
    (text, *_) = [each for each in EXAMPLES if "kind: DiffusionWorkflow" in each]
    with pytest.raises(InvalidWorkflow, match="did you mean preset"):
        load(DiffusionWorkflow, text.replace("preset:", "presett:"))


def test_the_model_made_by_hand_has_the_name_that_it_has_to_have() -> None:
    for text in EXAMPLES:
        found = yaml.safe_load(text)
        if found["kind"] == "DiffusionModel":
            assert identity_of(found, PlanCache()) == found["metadata"]["name"]
