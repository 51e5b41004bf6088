# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which models have to come up from zero together.

A held request waits for all of its workflow's models that have no replica. Bringing up some of
them serves nobody and holds GPUs, so they come all or none. A model that several workflows wait for
is in each of their groups; one that no workflow is known to wait for comes up alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kubediffusion.scaling.types import Decision, ModelCase, WorkflowCase


@dataclass(frozen=True, slots=True)
class Group:
    """`cannot` is why it cannot come up whatever the budget; empty if it can."""

    name: str
    models: tuple[str, ...]
    cannot: str = ""


def groups_of(
    cases: Mapping[str, ModelCase],
    alone: Mapping[str, Decision],
    workflows: Mapping[str, WorkflowCase],
    waiting: Mapping[str, float],
) -> list[Group]:
    """In the order in which they are served: who has waited longest, then by name."""
    asleep = {name for name in cases if cases[name].observation.current == 0}
    needed = {name for name in asleep if alone[name].wanted > 0}
    groups: list[Group] = []
    for name, workflow in workflows.items():
        models = tuple(sorted(workflow.models & needed))
        if models and (workflow.held is None or workflow.held > 0):
            groups.append(Group(name, models, _cannot(models, alone)))
    grouped = {model for group in groups for model in group.models}
    groups += [
        Group(model, (model,), _cannot((model,), alone)) for model in sorted(needed - grouped)
    ]
    return sorted(groups, key=lambda group: (waiting.get(group.name, float("inf")), group.name))


def _cannot(models: tuple[str, ...], alone: Mapping[str, Decision]) -> str:
    kept_down = [model for model in models if alone[model].replicas == 0]
    if not kept_down:
        return ""
    return "; ".join(f"{model} stays at 0: {alone[model].reason.value}" for model in kept_down)
