# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Markdown as tests read it: tables and their cells, headings, links."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]


def cells(line: str) -> list[str]:
    """Of one row. A bar in a cell is written as \\|."""
    parts = re.split(r"(?<!\\)\|", line.strip())
    return [part.strip().replace("\\|", "|") for part in parts[1:-1]]


def table(text: str) -> list[list[str]]:
    """The rows of the first table of `text`, without its head."""
    lines = text.splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("|"))
    rows: list[list[str]] = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
    return rows


def after(text: str, mark: str) -> str:
    _, found, rest = text.partition(mark)
    assert found, f"there is no {mark!r}"
    return rest


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    rest = after(text, f"\n{heading}\n")
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def codes(text: str) -> list[str]:
    """What stands in backticks, fenced blocks aside."""
    return re.findall(r"`([^`\n]+)`", without_blocks(text))


def without_links(cell: str) -> str:
    return re.sub(r"\[([^]]+)]\([^)]+\)", r"\1", cell)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def without_code(text: str) -> str:
    """Prose alone: neither fenced blocks nor what stands in backticks."""
    return re.sub(r"`[^`\n]*`", "", without_blocks(text))


def links(text: str) -> Iterator[str]:
    """Targets of all links and pictures."""
    yield from re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings, a second one of the same words numbered."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", without_blocks(text), flags=re.M):
        plain = without_links(heading).replace("`", "").lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        number = sum(1 for each in found if re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", each))
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def blocks(text: str, language: str) -> Sequence[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)
