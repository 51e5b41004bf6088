# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The chart's README has every value with its default, and the tables that docs/kubernetes.md has.

Those are held to the rendered policies and to a real API server by the tests of the chart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.unit.docs.pages import ROOT, blocks, codes, section, table

CHART = ROOT / "charts/kubediffusion"
PAGE = (CHART / "README.md").read_text()
KUBERNETES = (ROOT / "docs/kubernetes.md").read_text()
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def leaves(values: Any, path: str = "") -> Iterator[str]:
    """Paths of the values; an empty map or list is one."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path


def default_of(path: str) -> Any:
    """Raises KeyError where values.yaml has no such value."""
    found = VALUES
    for key in path.split("."):
        found = found[key]
    return found


def rows() -> list[tuple[str, Any]]:
    """(value, default) of each row."""
    found = table(section(PAGE, "## Values"))
    return [(codes(row[0])[0], yaml.safe_load(row[1].strip("`"))) for row in found]


def test_every_value_is_in_the_table() -> None:
    said = [path for path, _ in rows()]
    assert len(said) == len(set(said))
    missing = [
        leaf
        for leaf in leaves(VALUES)
        if not any(leaf == path or leaf.startswith(f"{path}.") for path in said)
    ]
    assert missing == []


@pytest.mark.parametrize(("path", "default"), rows(), ids=lambda value: str(value)[:40])
def test_defaults_are_those_of_values_yaml(path: str, default: Any) -> None:
    assert default_of(path) == default


def test_rows_are_in_the_order_of_values_yaml() -> None:
    said = [path for path, _ in rows()]
    order = list(leaves(VALUES))

    def place(path: str) -> int:
        return next(n for n, leaf in enumerate(order) if f"{leaf}.".startswith(f"{path}."))

    assert said == sorted(said, key=place)


def test_every_profile_is_there() -> None:
    said = {row[0] for row in table(section(PAGE, "## Profiles"))}
    files = {path.name for path in (ROOT / "examples/values").glob("*.yaml")}
    assert {re.findall(r"\[(\S+)]", cell)[0] for cell in said} == files


def test_the_edges_are_those_of_the_page() -> None:
    heading = "### Who may talk to whom"
    assert table(section(PAGE, heading)) == table(section(KUBERNETES, heading))


def test_the_rights_are_those_of_the_page() -> None:
    heading = "### What each account may do"
    theirs = table(section(KUBERNETES, heading))
    assert table(section(PAGE, heading)) == [
        row for row in theirs if row[0] != "every account of Kubernetes"
    ]


def test_values_that_commands_and_prose_name_exist() -> None:
    words = re.findall(r"--set ([\w.]+)=", " ".join([*codes(PAGE), *blocks(PAGE, "sh")]))
    tops = "|".join(VALUES)
    words += [
        code
        for code in codes(PAGE)
        if re.fullmatch(rf"(?:{tops})(?:\.\w+)+", code) and not code.endswith((".yaml", ".json"))
    ]
    assert len(words) > 100
    for path in words:
        default_of(path)
