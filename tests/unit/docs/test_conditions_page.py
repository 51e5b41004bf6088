# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""docs/resources.md explains every reason that a condition or an event can have, and no other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from kubediffusion.scaling import Reason
from kubediffusion_operator.autoscaler.status import HINDRANCES, TYPES
from kubediffusion_operator.planning.failures import _FIXES, _WAITING
from tests.unit.docs.pages import ROOT, cells, codes, section, table

PAGE = (ROOT / "docs/resources.md").read_text()
OPERATOR = ROOT / "operator/kubediffusion_operator"
SERVICES = ROOT / "services/kubediffusion"

# Why a request fails, not why a model does not load.
OF_REQUESTS = {"PromptTooLong"}
# What a node runs to have a model, and whoever looks into sources.
LOADING = [
    *(SERVICES / "models").rglob("*.py"),
    *(SERVICES / "node" / name for name in ("library.py", "residency.py", "weights.py")),
    SERVICES / "sources.py",
]
OF_NODES = {"OldGeneration"}  # what a node answers to an older plan
KINDS = {
    *("Resolved", "Ready", "Progressing", "Degraded", "OverrideConflict"),
    *("CoHosted", "EqualWeights", "PlanApplied", *TYPES),
}


def conditions_of_code() -> set[str]:
    """Reasons of all conditions, wherever they come from."""
    writers = [*(OPERATOR / "planning").glob("*.py"), *(OPERATOR / "autoscaler").glob("*.py")]
    return (
        {word for file in writers for word in _reasons(file)}
        | {word for file in LOADING for word in _reasons(file)} - OF_REQUESTS - OF_NODES
        | {*_FIXES, *_WAITING.values()}
        # Errors' own, where a source or a family says no other.
        | {"InvalidWorkflow", "InvalidInput", "UnsupportedModel", "SourceUnavailable", "Internal"}
        | {reason.value for reason in {*HINDRANCES, Reason.METRICS_UNKNOWN}}
    )


def _reasons(file: Path) -> Iterator[str]:
    """Words that are given as a reason: to one of the types that have one, or by that name."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Call(
                func=ast.Name(id="Condition"), args=[_, _, ast.Constant(str() as word), *_]
            ):
                yield word
            case ast.Call(
                func=ast.Name(id="Failure" | "because"), args=[ast.Constant(str() as word), *_]
            ):
                yield word
            case ast.Call(
                func=ast.Name(id="Metrics" | "Left"), args=[_, ast.Constant(str() as word), *_]
            ):
                yield word
            case ast.keyword(arg="reason", value=ast.Constant(str() as word)) if word:
                yield word
            case (
                ast.Assign(targets=[target], value=value)
                | ast.AnnAssign(target=target, value=value)
            ):
                yield from _assigned(target, value)


def _assigned(target: ast.expr, value: ast.expr | None) -> Iterator[str]:
    """Of `reason = "Word"`, `reason = "Word" if … else "Other"`, `reason, text = "Word", ...`."""
    match target, value:
        case _, ast.IfExp(body=body, orelse=other):
            yield from _assigned(target, body)
            yield from _assigned(target, other)
        case ast.Tuple(elts=[target, *_]), ast.Tuple(elts=[value, *_]):
            yield from _assigned(target, value)
        case (
            ast.Attribute(attr=name) | ast.Name(id=name),
            ast.Constant(str() as word),
        ) if name in ("reason", "READY", "SCALED_TO_ZERO") and word:
            yield word


def _events_of_code() -> set[str]:
    """Of events that are no condition's."""
    return {
        str(node.args[2].value)
        for file in OPERATOR.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "EventRecord"
        and isinstance(node.args[2], ast.Constant)
    }


def test_reasons_are_found_in_the_code() -> None:
    """One of each way in which code can say it; and nothing that is no condition's."""
    found = conditions_of_code()
    assert {"Resolving", "DoesNotFit", "NameIsNotIdentity", "Starting", "ScaledToZero"} <= found
    assert {"OOMKilled", "CreateContainerError", "QuotaExceeded", "LoadFailed"} <= found
    assert {"BadWeights", "RevisionNotFound", "Truncated", "UnknownFamily"} <= found
    assert {"NoGateway", "MetricsFound", "External", "PrometheusUnreachable"} <= found
    assert not {"PromptTooLong", "Steady", "EqualWeights", "OldGeneration"} & found
    assert _events_of_code() == {"ReplicasClamped", "WriteRefused"}


def test_every_reason_of_a_condition_is_explained_and_no_other() -> None:
    lines = section(PAGE, "## Conditions").splitlines()
    # Tables of reasons have them in the first column, the rest of a row is prose.
    rows = [cells(line) for line in lines if line.startswith("| `")]
    said = {word for row in rows for word in codes(row[0]) if word[0].isupper()}
    found = conditions_of_code()
    assert found - said == set(), "not explained in docs/resources.md"
    assert said - found - KINDS == set(), "explained, and nowhere in the code"
    assert said >= KINDS
    assert all(row[-1] or row[-2] for row in rows)


def test_every_event_is_explained() -> None:
    rows = table(section(PAGE, "## Events"))
    assert _events_of_code() == {code for row in rows for code in codes(row[0])}
