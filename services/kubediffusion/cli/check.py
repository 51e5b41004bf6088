# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`kubediffusion validate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kubediffusion.cli import shell
from kubediffusion.errors import KubeDiffusionError
from kubediffusion.local.workflows import read_workflow, resolve_workflow

if TYPE_CHECKING:
    from kubediffusion.workflow import ResolvedWorkflow


@dataclass(frozen=True)
class _Checked:
    path: Path
    name: str = ""
    resolved: ResolvedWorkflow | None = None
    error: KubeDiffusionError | None = None


def validate_files(paths: Sequence[Path], *, offline: bool, as_json: bool) -> None:
    """All files, whatever is wrong with the first; exit code 1 if any is wrong."""
    checked = [_check(path, offline) for path in paths]
    if as_json:
        content = [_as_json(each) for each in checked]
        shell.output().print(json.dumps(content, indent=2), markup=False, soft_wrap=True)
    else:
        for each in checked:
            _show(each)
    if any(each.error is not None for each in checked):
        raise typer.Exit(1)


def _check(path: Path, offline: bool) -> _Checked:
    try:
        definition = read_workflow(path)
        name = definition.metadata.name
        return _Checked(path, name, None if offline else resolve_workflow(definition))
    except KubeDiffusionError as error:
        return _Checked(path, error=error)


def _show(checked: _Checked) -> None:
    from kubediffusion.cli.screens import workflow_screen

    if checked.error is not None:
        shell.show_error(checked.error)
        return
    output = shell.output()
    note = "" if checked.resolved is not None else "; its sources were not looked into"
    output.print(f"[bold]{checked.path}[/bold]: {checked.name} [green]is valid[/green]{note}")
    if checked.resolved is not None:
        output.print()
        output.print(workflow_screen(checked.resolved))


def _as_json(checked: _Checked) -> dict[str, Any]:
    content: dict[str, Any] = {"file": str(checked.path), "valid": checked.error is None}
    if checked.error is not None:
        error = checked.error
        return content | {
            "reason": error.reason,
            "field": error.field,
            "message": error.message,
        }
    content["name"] = checked.name
    if checked.resolved is not None:
        resolved = checked.resolved
        content["models"] = [
            {
                "role": ref.role,
                "identity": ref.identity,
                "class": ref.class_name,
                "dtype": ref.dtype,
                "uri": ref.uri,
                "revision": ref.revision,
                "subfolder": ref.subfolder,
            }
            for ref in resolved.models.values()
        ]
        content["inputs"] = [
            asdict(spec) | {"type": str(spec.type)} for spec in resolved.inputs.values()
        ]
        content["loras"] = [asdict(lora) for lora in resolved.loras.values()]
    return content
