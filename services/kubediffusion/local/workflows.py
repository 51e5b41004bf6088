# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Workflow files of this machine, read, checked and resolved against their sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kubediffusion import api
from kubediffusion.errors import InvalidWorkflow, NotFound
from kubediffusion.resolving import resolve_workflow

if TYPE_CHECKING:
    from kubediffusion.workflow import ResolvedWorkflow


def read_workflow(path: Path) -> api.DiffusionWorkflow:
    """One file, checked as far as no source is needed. Raises InvalidWorkflow, NotFound."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}", field="-f") from None
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}", field="-f") from None
    base = path.resolve().parent
    return api.load_workflow(text, source=str(path), base=str(base))


def resolve_files(paths: Sequence[Path]) -> list[ResolvedWorkflow]:
    """Every file. Blocking. Two workflows of one name raise InvalidWorkflow."""
    resolved = [resolve_workflow(definition) for definition in map(read_workflow, paths)]
    names: dict[str, Path] = {}
    for path, each in zip(paths, resolved, strict=True):
        first = names.setdefault(each.name, path)
        if first is not path:
            raise InvalidWorkflow(
                f"{each.name!r} is the name of the workflow in {first} too; rename one",
                field="metadata.name",
            )
    return resolved
