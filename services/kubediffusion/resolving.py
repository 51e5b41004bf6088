# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A workflow looked up in its sources: what its pipeline holds, and the commits that names mean.

The one part of resolving that needs a disk or a network. `workflow.resolve`, which is pure, does
the rest; what was found can be kept, so that it is looked up once only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from kubediffusion import api, artifacts, sources, workflow
from kubediffusion.api.serving import Pruning
from kubediffusion.errors import InvalidWorkflow, KubeDiffusionError


@dataclass(frozen=True)
class Findings:
    """`commits` by (uri, revision), of the sources besides the pipeline's that have commits."""

    index: sources.Index
    commits: Mapping[tuple[str, str], str]


def look_up(definition: api.DiffusionWorkflow) -> Findings:
    """Which parts the pipeline has, and at which commits its sources are. Blocking.

    Raises SourceUnavailable, UnsupportedModel, InvalidInput, with the field at fault.
    """
    source = definition.spec.pipeline.source
    with _at("spec.pipeline.source"):
        index = sources.read_index(source.uri, source.revision)
    commits: dict[tuple[str, str], str] = {}
    for other in workflow.sources(definition):
        with _at(f"source {other.uri}"):
            # Enough to know that it is there, and its commit.
            opened = sources.open(other.uri, other.revision, allow=("config.json",))
        if opened.commit:
            commits[other.uri, other.revision] = opened.commit
    for role, override in definition.spec.models.items():
        if override.pruning is not None:
            _check_pruning(override.pruning, f"spec.models.{role}.pruning")
    return Findings(index, commits)


def _check_pruning(pruning: Pruning, field: str) -> None:
    """Raises UnsupportedModel for what is no artifact, InvalidWorkflow for a budget it lacks."""
    source = pruning.artifact
    with _at(f"{field}.artifact"):
        own = f"{source.subfolder}/" if source.subfolder else ""
        opened = sources.open(source.uri, source.revision, allow=(own + artifacts.MANIFEST,))
        folder = opened.path / source.subfolder if source.subfolder else opened.path
        budgets = (1.0, *artifacts.read_budgets(folder, source.uri))
    if not any(abs(float(pruning.budget) - each) < 1e-6 for each in budgets):
        raise InvalidWorkflow(
            f"{pruning.budget} is no budget of this artifact; it has "
            f"{', '.join(f'{each:g}' for each in budgets)}",
            field=f"{field}.budget",
        )


def resolve_workflow(definition: api.DiffusionWorkflow) -> workflow.ResolvedWorkflow:
    """Looks a workflow up and resolves it. Blocking.

    Raises InvalidWorkflow, SourceUnavailable, UnsupportedModel.
    """
    findings = look_up(definition)
    return workflow.resolve(definition, findings.index, findings.commits)


@contextmanager
def _at(field: str) -> Iterator[None]:
    """The sources room knows a URI; whoever wrote the workflow knows the field."""
    try:
        yield
    except KubeDiffusionError as error:
        if error.field in ("", "uri", artifacts.FIELD):
            error.field = field
        raise
