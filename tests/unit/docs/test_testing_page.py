# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""docs/testing.md names what is there: targets, folders, scripts, programs, words of skips."""

from __future__ import annotations

import re

from benchmarks.run import SUITES
from tests.unit.docs.pages import ROOT, blocks, codes, section, table

PAGE = (ROOT / "docs/testing.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
ASSETS = (ROOT / "scripts/cluster/assets").read_text()


def test_every_tier_is_there() -> None:
    said = {code.removeprefix("make ") for row in table(PAGE) for code in codes(row[0])}
    targets = set(re.findall(r"^([a-z0-9-]+):.*## ", MAKEFILE, re.MULTILINE))
    assert {"test", "test-all", "e2e", "bench", "lint"} <= said
    assert said - {"helm test"} <= targets


def test_every_folder_of_tests_is_there() -> None:
    said = {codes(row[0])[0] for row in table(section(PAGE, "## Where a test belongs"))}
    folders = {
        f"tests/{path.name}"
        for path in (ROOT / "tests").iterdir()
        if path.is_dir() and any(path.rglob("test_*.py"))
    }
    assert said == folders


def test_every_path_is_there() -> None:
    words = " ".join([*codes(PAGE), *blocks(PAGE, "sh")])
    named = re.findall(r"(?<![\w/.])(?:tests|scripts|examples|charts|benchmarks)/[\w./-]*\w", words)
    assert len(named) > 15
    gone = {name for name in named if not (ROOT / name).exists()}
    assert gone - {"benchmarks/results/SUITE.csv"} == set()


def test_every_make_target_is_there() -> None:
    for target in re.findall(r"`make ([a-z0-9-]+)", PAGE):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_programs_of_the_tiers_are_named() -> None:
    built = (ROOT / "scripts/test").read_text()
    (arguments,) = re.findall(r"scripts/cluster/assets (.+) >/dev/null", built)
    (plane,) = re.findall(r"^control_plane=\((.+)\)$", ASSETS, re.MULTILINE)
    programs = {*arguments.split(), *plane.split()} - {"control-plane"}
    (row,) = [row for row in table(PAGE) if codes(row[0]) == ["make test"]]
    assert {name for name in programs if name not in row[3].lower()} == set()


def test_skips_say_what_the_page_says() -> None:
    sources = [*(ROOT / "tests").rglob("*.py"), ROOT / "scripts/e2e", ROOT / "scripts/lint"]
    code = "\n".join(path.read_text() for path in sources if path.name != "test_testing_page.py")
    loud = re.findall(r"`([A-Z][A-Z ,-]{12,})(?: helm)?`", section(PAGE, "## What is skipped"))
    assert len(loud) == 3
    assert [words for words in loud if words not in code] == []


def test_suites_are_those_of_make_bench() -> None:
    (row,) = [row for row in table(section(PAGE, "## Figures")) if "make bench" in row[0]]
    assert codes(row[2]) == list(SUITES)
