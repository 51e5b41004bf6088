# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A workflow together with what its sources said: enough to resolve it again without looking.

The operator looks into a workflow's sources once and keeps the answer as a ControllerRevision.
Whoever needs the resolved workflow, the operator or a gateway, decodes that: all of them see the
same weights, whatever a branch points to meanwhile, and nobody needs the network for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError

from kubediffusion.api.load import format_path
from kubediffusion.api.types import Source
from kubediffusion.api.workflow import DiffusionWorkflow
from kubediffusion.errors import InvalidWorkflow
from kubediffusion.workflow.resolve import Index, resolve, sources
from kubediffusion.workflow.values import PipelineIndex, ResolvedWorkflow

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Revision:
    """One ControllerRevision: its `number` counts up, `data` is what `encode` made."""

    name: str
    number: int
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Pins:
    """What a workflow's sources said: the pipeline's index, and commits by (uri, revision)."""

    index: PipelineIndex
    commits: Mapping[tuple[str, str], str]


def encode(
    workflow: DiffusionWorkflow, index: Index, commits: Mapping[tuple[str, str], str]
) -> dict[str, Any]:
    """The `data` of a ControllerRevision: plain JSON, equal for equal workflows.

    Fields that say what is the case without them are left out, so that it does not matter whether
    an API server has filled in the defaults. Commits of other sources are left out too.
    """
    wanted = {(source.uri, source.revision) for source in sources(workflow)}
    return {
        "format": FORMAT,
        "workflow": {
            "apiVersion": workflow.api_version,
            "kind": workflow.kind,
            "metadata": {"name": workflow.metadata.name},
            "spec": plain_spec(workflow),
        },
        "index": {"components": dict(sorted(index.components.items())), "commit": index.commit},
        "commits": [
            {"uri": uri, "revision": revision, "commit": commits[uri, revision]}
            for uri, revision in sorted(wanted & commits.keys())
        ],
    }


def plain_spec(workflow: DiffusionWorkflow) -> dict[str, Any]:
    """The spec as JSON without defaults: equal for two workflows that mean the same."""
    plain = workflow.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return cast("dict[str, Any]", _whole(plain))


def _whole(value: object) -> object:
    """4.0 as 4, as API servers send it."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in cast("dict[str, object]", value).items()}
    if isinstance(value, list):
        return [_whole(item) for item in cast("list[object]", value)]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def decode(data: Mapping[str, Any]) -> ResolvedWorkflow:
    """The workflow as it was resolved. Raises InvalidWorkflow, on an unknown format too."""
    pins = pins_of(data)
    return resolve(definition_of(data), pins.index, pins.commits)


def definition_of(data: Mapping[str, Any]) -> DiffusionWorkflow:
    """The workflow as its author wrote it. Raises InvalidWorkflow."""
    _check_format(data)
    try:
        return DiffusionWorkflow.model_validate_json(json.dumps(data["workflow"]))
    except (KeyError, ValidationError) as error:
        if isinstance(error, ValidationError) and (field := _unknown_field(error)):
            # What it means nobody here knows: serving the rest might draw other pictures.
            raise InvalidWorkflow(
                f"the revision has a field that this version does not know, {field}: a newer "
                "KubeDiffusion wrote it; upgrade this one",
                field=field,
            ) from None
        raise _unreadable(error) from None


def _unknown_field(error: ValidationError) -> str:
    """The first one, as a path; empty where there is none."""
    unknown = (e for e in error.errors(include_url=False) if e["type"] == "extra_forbidden")
    return next((format_path(tuple(each["loc"])) for each in unknown), "")


def pins_of(data: Mapping[str, Any]) -> Pins:
    """What the sources said when the revision was made. Raises InvalidWorkflow."""
    _check_format(data)
    try:
        index = PipelineIndex(dict(data["index"]["components"]), str(data["index"]["commit"]))
        commits = {(str(c["uri"]), str(c["revision"])): str(c["commit"]) for c in data["commits"]}
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(error) from None
    return Pins(index, commits)


def revision_name(workflow_name: str, data: Mapping[str, Any]) -> str:
    """``sd3-5f0c8a6b21``: the same for the same data, so that making one twice makes one."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    return f"{workflow_name}-{hashlib.sha256(canonical).hexdigest()[:10]}"


def pinned_spec(data: Mapping[str, Any]) -> dict[str, Any]:
    """The spec with the resolved commits written in: applied, it serves these weights again.

    Raises InvalidWorkflow.
    """
    definition, pins = definition_of(data), pins_of(data)
    spec = plain_spec(definition)
    pipeline = definition.spec.pipeline.source
    known = {**pins.commits}
    if pins.index.commit:
        spec["pipeline"]["source"]["revision"] = pins.index.commit
        # The same branch of the same source, used elsewhere, was read at its own time.
        known.setdefault((pipeline.uri, pipeline.revision), pins.index.commit)
    others = [item for key in ("controlNets", "loras") for item in spec.get(key, ())]
    overrides = cast("dict[str, dict[str, Any]]", spec.get("models", {})).values()
    others += [override for override in overrides if "source" in override]
    written = [item["source"] for item in others]
    written += [override["pruning"]["artifact"] for override in overrides if "pruning" in override]
    for source in written:
        commit = known.get((source["uri"], source.get("revision", "")))
        if commit:
            source["revision"] = commit
    return spec


def same_sources(old: DiffusionWorkflow, new: DiffusionWorkflow) -> bool:
    """Whether the pins of `old` do for `new`: it names no source that `old` did not."""

    def named(source: Source) -> tuple[str, str]:
        return source.uri, source.revision

    if named(old.spec.pipeline.source) != named(new.spec.pipeline.source):
        return False
    return {named(s) for s in sources(new)} <= {named(s) for s in sources(old)}


def _check_format(data: Mapping[str, Any]) -> None:
    if data.get("format") != FORMAT:
        raise InvalidWorkflow(
            f"the revision's format is {data.get('format')!r} and this version reads {FORMAT}: "
            "a newer KubeDiffusion wrote it; upgrade this one, or apply the workflow again",
            field="data.format",
        )


def _unreadable(error: Exception) -> InvalidWorkflow:
    return InvalidWorkflow(
        f"the revision cannot be read ({type(error).__name__}: {error}); apply the workflow again",
        field="data",
    )
