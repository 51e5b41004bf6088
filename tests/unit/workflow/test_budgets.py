# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sd3_case import resolved

from kubediffusion.errors import InvalidInput, InvalidWorkflow
from kubediffusion.workflow import ResolvedWorkflow, choose_budget, offered_budgets, work_share

FACTS = {"budgets": "0.8,0.6,0.4", "blocks": 8}
ARTIFACT = {"uri": "hf://org/pruned"}


def pruned(**pruning: str) -> ResolvedWorkflow:
    return with_transformer(pruning={"artifact": ARTIFACT, **pruning})


def with_transformer(numerics: str = "exact", **override: Any) -> ResolvedWorkflow:
    models = json.dumps({"transformer": override})
    return resolved(f"  models: {models}\n  numerics: {numerics}\n")


def test_a_request_takes_the_workflows_budget_or_another_shipped_one() -> None:
    workflow = pruned(budget="0.6")
    assert choose_budget(workflow, None, FACTS) == 0.6
    assert choose_budget(workflow, 0.4, FACTS) == 0.4
    assert choose_budget(workflow, 0.1 + 0.3, FACTS) == 0.4
    # What the artifact ships is the node's to say where no node has told it yet.
    assert choose_budget(workflow, 0.5, {}) == 0.5


def test_budget_1_is_the_artifacts_dense_model() -> None:
    assert choose_budget(pruned(), None, FACTS) is None
    assert choose_budget(pruned(budget="0.6"), 1.0, FACTS) is None
    assert choose_budget(pruned(budget="1.0"), 0.8, FACTS) == 0.8


def test_a_workflow_without_an_artifact_has_its_own_dense_model_alone() -> None:
    workflow = resolved()
    assert choose_budget(workflow, None, {}) is None
    assert choose_budget(workflow, 1.0, {}) is None
    with pytest.raises(InvalidInput, match="prunes no tokens; leave the budget out") as info:
        choose_budget(workflow, 0.6, {})
    assert info.value.field == "budget"


def test_what_the_artifact_does_not_ship_is_refused_with_what_can_be_asked_for() -> None:
    with pytest.raises(InvalidInput, match=r"1, 0\.8, 0\.6, 0\.4 can be asked for"):
        choose_budget(pruned(), 0.5, FACTS)
    bounded = pruned(budget="0.6", minBudget="0.5", maxBudget="0.9")
    with pytest.raises(InvalidInput, match=r"artifact; 0\.8, 0\.6 can be asked for"):
        choose_budget(bounded, 0.7, FACTS)


@pytest.mark.parametrize("asked", [0.4, 1.0])
def test_the_workflow_bounds_what_a_request_may_ask_for(asked: float) -> None:
    bounded = pruned(budget="0.6", minBudget="0.6", maxBudget="0.8")
    assert choose_budget(bounded, 0.8, FACTS) == 0.8
    with pytest.raises(InvalidInput, match=r"out of this workflow's bounds; 0\.6 to 0\.8"):
        choose_budget(bounded, asked, FACTS)


@given(st.floats().filter(lambda x: all(abs(x - b) > 1e-5 for b in (1, 0.8, 0.6, 0.4))))
def test_no_number_gets_through_that_is_no_budget(asked: float) -> None:
    with pytest.raises(InvalidInput) as info:
        choose_budget(pruned(), asked, FACTS)
    assert info.value.field == "budget"


@pytest.mark.parametrize(
    ("pruning", "field"),
    [
        ({"budget": "0.4", "minBudget": "0.6"}, "minBudget"),
        ({"maxBudget": "0.8"}, "maxBudget"),
        ({"budget": "0"}, "budget"),
    ],
)
def test_a_default_outside_of_its_own_bounds_is_refused(
    pruning: dict[str, str], field: str
) -> None:
    with pytest.raises(InvalidWorkflow) as info:
        pruned(**pruning)
    assert f"spec.models.transformer.pruning.{field}: " in str(info.value)


def test_the_budget_is_no_part_of_the_identity_and_the_artifact_is() -> None:
    own = resolved().models["transformer"].identity
    first = pruned(budget="0.6", minBudget="0.4").models["transformer"]
    assert first.identity == pruned(budget="0.8").models["transformer"].identity != own
    assert first.options == {"pruning_uri": "hf://org/pruned"}


def test_what_can_be_asked_for_is_told_once_a_node_has_told_it() -> None:
    bounded = pruned(budget="0.6", minBudget="0.5")
    assert offered_budgets(bounded, FACTS) == (1.0, 0.8, 0.6)
    assert offered_budgets(bounded, {}) == offered_budgets(resolved(), FACTS) == ()


def test_a_budget_scales_the_work_of_the_blocks_that_it_prunes() -> None:
    assert work_share(None, FACTS) == work_share(0.6, {}) == 1.0
    assert work_share(0.6, FACTS) == pytest.approx((1 + 7 * 0.6) / 8)


def test_compiled_code_is_no_exact_one() -> None:
    with pytest.raises(InvalidWorkflow, match="numerics: fast") as info:
        with_transformer(compile="default")
    assert info.value.field == "spec.models.transformer.compile"
    fast = with_transformer("fast", compile="default")
    assert fast.models["transformer"].options == {"compile": "default"}
    with pytest.raises(InvalidWorkflow, match="offers none, default"):
        with_transformer("fast", compile="max-autotune")
