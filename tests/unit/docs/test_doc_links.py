# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Every page that a page links to is there, and so is the heading."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.docs.pages import ROOT, anchors, links

FOLDERS = ("docs", "charts", "models")
PAGES = [
    *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")),
    *(ROOT / name for name in ("README.md", "AGENTS.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    lost = [target for target in links(page.read_text()) if not _is_there(page, target)]
    assert lost == []


def _is_there(page: Path, target: str) -> bool:
    if target.startswith(("http://", "https://")):
        return True
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    if not path.exists():
        return False
    return not anchor or anchor in anchors(path.read_text())


def test_a_link_that_leads_nowhere_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One thing\n[a](#one-thing) [b](page.md#one-thing) `[c](nowhere.md)`\n")
    assert [target for target in links(page.read_text()) if not _is_there(page, target)] == []
    page.write_text("# One\n[a](#two) [b](nowhere.md) [c](https://example.com/x)\n")
    lost = [target for target in links(page.read_text()) if not _is_there(page, target)]
    assert lost == ["#two", "nowhere.md"]
