# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The replicas of all models of a namespace: one GPU budget, and workflows that come up whole.

Each model is decided for itself first. Then the budget is handed out (`allocate`): minimums and the
first replica of each model that runs, then workflows that wait at zero, each whole or not at all,
then the replicas that run, then more. So the first replica of a workflow goes before the second of
another, and a replica that runs and is needed before one that does not run yet.
What was handed out is asked for once the GPUs are free in fact (`admit`): pods that drain still
hold theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kubediffusion.scaling.activation import Group, groups_of
from kubediffusion.scaling.allocation import allocate
from kubediffusion.scaling.decide import decide
from kubediffusion.scaling.gate import admit
from kubediffusion.scaling.history import ScalingHistory
from kubediffusion.scaling.types import Budget, Decision, ModelCase, Reason, WorkflowCase


@dataclass(frozen=True, slots=True)
class Namespace:
    """All that is decided together: models by name, workflows by name."""

    models: Mapping[str, ModelCase]
    workflows: Mapping[str, WorkflowCase] = field(default_factory=dict[str, WorkflowCase])
    budget: Budget = field(default_factory=Budget)


@dataclass(frozen=True, slots=True)
class Book:
    """What is remembered between rounds besides histories: since when which workflow (or model
    without one) waits at zero."""

    waiting: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class Round:
    """Decisions by model. `histories` have this round's recommendations; changes that were carried
    out are still to be added to them (`ScalingHistory.scaled`)."""

    decisions: Mapping[str, Decision]
    histories: Mapping[str, ScalingHistory]
    book: Book


def decide_all(namespace: Namespace, book: Book, now: float) -> Round:
    """Depends on nothing but its arguments, and not on the order of their mappings."""
    cases = {name: namespace.models[name] for name in sorted(namespace.models)}
    alone = {
        name: decide(case.observation, case.limits, case.history, now)
        for name, case in cases.items()
    }
    groups = groups_of(cases, alone, namespace.workflows, book.waiting)
    allocation = allocate(cases, alone, groups, namespace.budget)
    granted = admit(cases, allocation, namespace.budget)
    decisions = {
        name: _final(case, alone[name], allocation.replicas[name], granted[name], namespace.budget)
        if name not in allocation.blocked
        else _blocked(case, alone[name], allocation.blocked[name])
        for name, case in cases.items()
    }
    histories = {
        name: case.history.recommended(
            now, alone[name].wanted, max(case.limits.up.window, case.limits.down.window)
        )
        for name, case in cases.items()
    }
    return Round(decisions, histories, Book(_still_waiting(groups, decisions, book, now)))


def _final(
    case: ModelCase, alone: Decision, allocated: int, granted: int, budget: Budget
) -> Decision:
    """What the model gets, and why it is not what it would have got alone."""
    if granted == alone.replicas:
        return alone
    of_all = f"the {budget.bound} GPUs for models here"
    if granted < allocated:
        reason, why = Reason.WAITING_FOR_GPUS, f"pods that are ending still hold some of {of_all}"
    elif granted < case.observation.current:
        reason, why = Reason.BUDGET_SHARED, f"{of_all} are needed more by others"
    else:
        reason, why = Reason.BUDGET, f"no more of {of_all} are free"
    text = f"{alone.message}; {alone.replicas} would take {alone.replicas * case.gpus} GPUs: {why}"
    return replace(alone, replicas=granted, reason=reason, message=text, hindrance=why)


def _blocked(case: ModelCase, alone: Decision, why: str) -> Decision:
    return replace(
        alone,
        replicas=case.observation.current,
        reason=Reason.ACTIVATION_BLOCKED,
        message=f"{alone.message}; {why}",
        hindrance=why,
    )


def _still_waiting(
    groups: list[Group], decisions: Mapping[str, Decision], book: Book, now: float
) -> dict[str, float]:
    return {
        group.name: book.waiting.get(group.name, now)
        for group in groups
        if any(decisions[model].replicas == 0 for model in group.models)
    }
