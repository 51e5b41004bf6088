# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How many tokens a request's transformer keeps.

A *budget* is the mean share of image tokens that the prunable blocks compute. The artifact ships a
table for each of its budgets, and budget 1 keeps every token: the *dense model of the artifact*,
whose weights the artifact's adapter has changed. A workflow without `pruning` has the pipeline's
*own dense model*, and budget 1 means that one.
"""

from __future__ import annotations

from collections.abc import Mapping

from kubediffusion.errors import InvalidInput
from kubediffusion.workflow.values import Pruning, ResolvedWorkflow, Value

FIELD = "budget"
# Budgets are written in decimals and travel as floats.
_TOLERANCE = 1e-6


def choose_budget(
    resolved: ResolvedWorkflow, asked: float | None, facts: Mapping[str, Value]
) -> float | None:
    """The shipped budget that a request runs at; None where it keeps all tokens.

    `facts` are the transformer's; what the artifact ships is left to the node where they are not
    known. Raises InvalidInput, field ``budget``.
    """
    pruning = resolved.pruning
    if asked is not None and not 0.0 < asked <= 1.0:
        raise InvalidInput("the budget is a share of tokens: above 0, at most 1", field=FIELD)
    if pruning is None:
        if asked is None or _same(asked, 1.0):
            return None
        raise InvalidInput(
            f"workflow {resolved.name} prunes no tokens; leave the budget out, or give its "
            "models.transformer a pruning artifact",
            field=FIELD,
        )
    budget = pruning.budget if asked is None else asked
    _check_bounds(pruning, budget)
    if _same(budget, 1.0):
        return None
    shipped = shipped_budgets(facts)
    found = next((each for each in shipped if _same(each, budget)), None)
    if shipped and found is None:
        offered = offered_budgets(resolved, facts)
        raise InvalidInput(
            f"{budget:g} is no budget of this workflow's artifact; "
            f"{', '.join(f'{each:g}' for each in offered)} can be asked for",
            field=FIELD,
        )
    return budget if found is None else found


def offered_budgets(resolved: ResolvedWorkflow, facts: Mapping[str, Value]) -> tuple[float, ...]:
    """What requests may ask for, the largest first; empty while no node has told its artifact's."""
    pruning, shipped = resolved.pruning, shipped_budgets(facts)
    if pruning is None or not shipped:
        return ()
    return tuple(each for each in (1.0, *shipped) if _within(pruning, each))


def shipped_budgets(facts: Mapping[str, Value]) -> tuple[float, ...]:
    """What a transformer's facts say of its artifact, the largest first; empty where nothing."""
    text = facts.get("budgets", "")
    return tuple(float(each) for each in str(text).split(",") if each)


def work_share(budget: float | None, facts: Mapping[str, Value]) -> float:
    """About how much of the dense model's work a budget leaves: its blocks' linear layers'.

    Block 0 is always dense. Attention shrinks faster than that, selection costs a little: the
    first measurements of a budget take this guess's place.
    """
    blocks = facts.get("blocks")
    if budget is None or not isinstance(blocks, int) or blocks < 1:
        return 1.0
    return (1.0 + (blocks - 1) * budget) / blocks


def _check_bounds(pruning: Pruning, budget: float) -> None:
    if not _within(pruning, budget):
        raise InvalidInput(
            f"{budget:g} is out of this workflow's bounds; {pruning.minimum:g} to "
            f"{pruning.maximum:g} is allowed",
            field=FIELD,
        )


def _within(pruning: Pruning, budget: float) -> bool:
    return pruning.minimum - _TOLERANCE <= budget <= pruning.maximum + _TOLERANCE


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= _TOLERANCE
