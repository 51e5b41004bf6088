# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Models of a namespace: a GPU budget, and workflows that come up whole or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_cases import NOW, World, namespaces

from kubediffusion.scaling import (
    Book,
    Budget,
    Demand,
    Limits,
    Metrics,
    MetricState,
    ModelCase,
    Namespace,
    Observation,
    Reason,
    ScalingHistory,
    WorkflowCase,
    decide,
    decide_all,
)

LIMITS = Limits(minimum=0, maximum=8, target=2.0)
UNKNOWN = Metrics(MetricState.UNKNOWN, "NoAnswer", "nobody answers")


def model(
    current: int = 0,
    demand: float = 0.0,
    *,
    gpus: int = 1,
    limits: Limits = LIMITS,
    ending: int = 0,
    metrics: Metrics = UNKNOWN,
    known: bool = True,
) -> ModelCase:
    return ModelCase(
        Observation(
            current,
            Demand(running=demand) if current else Demand(held=demand),
            Metrics() if known else metrics,
            ready=current,
        ),
        limits,
        ScalingHistory.begin(NOW, current),
        gpus=gpus,
        live=current,
        ending=ending,
    )


def decided(namespace: Namespace, book: Book | None = None) -> dict[str, tuple[int, Reason]]:
    decisions = decide_all(namespace, book or Book(), NOW).decisions
    return {name: (each.replicas, each.reason) for name, each in decisions.items()}


def sd3(*, held: float, **models: ModelCase) -> Namespace:
    return Namespace(models, {"sd3": WorkflowCase(frozenset(models), held)})


# ---------------------------------------------------------------- from zero


def test_a_workflow_comes_up_whole():
    got = decided(
        replace(
            sd3(held=1, clip=model(demand=1), dit=model(demand=1), vae=model(demand=1)),
            budget=Budget(limit=3),
        )
    )
    assert got == dict.fromkeys(("clip", "dit", "vae"), (1, Reason.ACTIVATED))


def test_or_not_at_all_and_says_what_it_would_take():
    namespace = replace(
        sd3(held=1, clip=model(demand=1, gpus=0), dit=model(demand=1, gpus=2), vae=model(demand=1)),
        budget=Budget(limit=2),
    )
    assert decided(namespace) == dict.fromkeys(
        ("clip", "dit", "vae"), (0, Reason.ACTIVATION_BLOCKED)
    )
    message = decide_all(namespace, Book(), NOW).decisions["clip"].message
    assert "sd3 needs 3 GPUs to come up, and 2 of the 2 for models here are left" in message


def test_models_that_are_up_are_not_paid_for_again():
    got = decided(
        replace(
            sd3(held=1, clip=model(1, 0), dit=model(demand=1, gpus=2), vae=model(1, 0)),
            budget=Budget(limit=4),
        )
    )
    assert got["dit"] == (1, Reason.ACTIVATED)


def test_what_a_workflow_does_not_need_stays_down():
    """Its ControlNet, say, where no request asks for one."""
    got = decided(sd3(held=1, dit=model(demand=1), canny=model(demand=0)))
    assert got == {"dit": (1, Reason.ACTIVATED), "canny": (0, Reason.STEADY)}


def test_another_workflow_that_nobody_asks_for_does_not_wake_a_part_of_this_one():
    """They share the encoder. Both DiTs are asleep, only one of them is needed, and it does not
    fit: then the encoder is of no use, though the other workflow has nothing else missing."""
    models = {"clip": model(demand=1), "dit": model(demand=1, gpus=4), "flux": model()}
    workflows = {
        "sd3": WorkflowCase(frozenset({"clip", "dit"}), 1),
        "flux": WorkflowCase(frozenset({"clip", "flux"}), 0),
    }
    got = decided(Namespace(models, workflows, Budget(limit=4)))
    assert {replicas for replicas, _ in got.values()} == {0}


def test_of_two_workflows_the_one_that_waits_longer_comes_first():
    models = {name: model(demand=1) for name in ("a", "b")}
    workflows = {name: WorkflowCase(frozenset({name}), 1) for name in ("a", "b")}
    namespace = Namespace(models, workflows, Budget(limit=1))
    assert decided(namespace)["a"][0] == 1
    got = decided(namespace, Book({"b": NOW - 60, "a": NOW - 10}))
    assert got == {"a": (0, Reason.ACTIVATION_BLOCKED), "b": (1, Reason.ACTIVATED)}


def test_the_time_of_waiting_is_kept_until_it_ends():
    world = World(
        Namespace(
            {"a": model(1, 2), "b": model(demand=1)},
            {"w": WorkflowCase(frozenset({"b"}), 1)},
            Budget(limit=1),
        )
    )
    world.tick()
    waiting = decide_all(
        Namespace(world.models, world.workflows, world.budget), Book({"w": NOW}), NOW + 50
    ).book.waiting
    assert waiting == {"w": NOW}
    world.budget = Budget(limit=2)
    done = decide_all(
        Namespace(world.models, world.workflows, world.budget), Book({"w": NOW}), NOW + 50
    )
    assert done.decisions["b"].replicas == 1
    assert not done.book.waiting


def test_a_waiting_workflow_takes_the_second_replica_of_another_and_never_the_first():
    world = World(
        Namespace(
            {"busy": model(4, 8), "dit": model(demand=1), "vae": model(demand=1)},
            {"sd3": WorkflowCase(frozenset({"dit", "vae"}), 1)},
            Budget(limit=4),
        ),
        drain=3,
    )
    first = world.tick()
    assert first["busy"].reason is Reason.BUDGET_SHARED
    assert world.replicas() == {"busy": 2, "dit": 0, "vae": 0}
    assert first["dit"].reason is Reason.WAITING_FOR_GPUS
    seen = [world.replicas()]
    for _ in range(10):
        assert world.gpus() <= 4
        world.tick()
        seen.append(world.replicas())
    # Nothing of it comes before the pods that drain are gone, and then all of it.
    assert {tuple(each.values()) for each in seen} == {(2, 0, 0), (2, 1, 1)}


def test_a_model_that_no_known_workflow_waits_for_comes_up_alone():
    assert decided(Namespace({"vae": model(demand=1)}))["vae"] == (1, Reason.ACTIVATED)


def test_a_workflow_of_which_one_model_may_not_come_up_waits_whole():
    asleep = Limits(minimum=0, maximum=8, up=replace(LIMITS.up, select=_disabled()))
    namespace = sd3(held=1, dit=model(demand=1), vae=model(demand=1, limits=asleep))
    assert decided(namespace) == dict.fromkeys(("dit", "vae"), (0, Reason.ACTIVATION_BLOCKED))
    message = decide_all(namespace, Book(), NOW).decisions["dit"].message
    assert "vae stays at 0: RateLimited" in message


def _disabled():
    from kubediffusion.scaling import Select

    return Select.DISABLED


# ---------------------------------------------------------------- above one


def test_each_scales_alone_where_the_budget_suffices():
    got = decided(Namespace({"clip": model(1, 1), "dit": model(1, 6)}, budget=Budget(limit=8)))
    assert got == {"clip": (1, Reason.STEADY), "dit": (3, Reason.ROSE)}


def test_the_next_gpu_goes_where_the_load_per_replica_is_greatest():
    got = decided(
        Namespace({"a": model(1, 8), "b": model(1, 16), "c": model(1, 2)}, budget=Budget(limit=6))
    )
    assert {name: replicas for name, (replicas, _) in got.items()} == {"a": 2, "b": 3, "c": 1}
    assert got["a"][1] is got["b"][1] is Reason.BUDGET


def test_models_without_a_gpu_cost_no_budget():
    got = decided(Namespace({"clip": model(1, 16, gpus=0)}, budget=Budget(limit=0)))
    assert got["clip"][0] == 5  # as fast as the rate allows


def test_a_large_model_that_does_not_fit_leaves_the_rest_to_small_ones():
    got = decided(Namespace({"l": model(1, 16, gpus=4), "s": model(1, 6)}, budget=Budget(limit=7)))
    assert {name: replicas for name, (replicas, _) in got.items()} == {"l": 1, "s": 3}


def test_pods_that_end_still_hold_their_gpus():
    got = decided(Namespace({"a": model(1, 1, ending=2), "b": model(1, 6)}, budget=Budget(limit=4)))
    assert got["b"] == (1, Reason.WAITING_FOR_GPUS)


@pytest.mark.parametrize(("used", "replicas"), [(2, 3), (5, 3), (6, 2), (7, 1), (9, 1)])
def test_a_resource_quota_counts_what_others_use_too(used, replicas):
    budget = Budget(quota=7, quota_used=used)
    assert decided(Namespace({"a": model(1, 6)}, budget=budget))["a"][0] == replicas


def test_pods_that_are_still_to_come_are_in_a_quota_already():
    """Two were asked for and are not there yet; others use 7 of the 10."""
    coming = replace(model(2, 16), live=0)
    budget = Budget(quota=10, quota_used=7)
    assert decided(Namespace({"a": coming}, budget=budget))["a"][0] == 3


def test_a_quota_that_is_full_takes_nothing_away():
    budget = Budget(quota=7, quota_used=7)
    assert decided(Namespace({"a": model(3, 6)}, budget=budget))["a"] == (3, Reason.STEADY)


def test_a_budget_that_shrank_takes_back_what_is_needed_least():
    two = replace(LIMITS, minimum=2)
    models = {"a": model(3, 6), "b": model(3, 5.9), "kept": model(2, 0, limits=two)}

    def replicas(limit: int) -> list[int]:
        got = decided(Namespace(models, budget=Budget(limit=limit)))
        return [got[name][0] for name in ("a", "b", "kept")]

    assert replicas(8) == [3, 3, 2]
    assert replicas(5) == [2, 1, 2]
    # No minimum, and not the last one of a model that is in use.
    assert replicas(1) == [1, 1, 2]


def test_of_unknown_demand_nothing_is_taken_back():
    got = decided(Namespace({"a": model(3, known=False), "b": model(1, 6)}, budget=Budget(limit=2)))
    assert got == {"a": (3, Reason.METRICS_UNKNOWN), "b": (1, Reason.BUDGET)}


def test_gpus_of_pods_that_others_scale_are_not_there():
    budget = Budget(limit=4, reserved=2)
    assert decided(Namespace({"a": model(1, 16)}, budget=budget))["a"] == (2, Reason.BUDGET)


# ---------------------------------------------------------------- for any numbers


@given(namespaces())
def test_the_budget_is_never_exceeded_by_anything_that_is_added(namespace):
    done = decide_all(namespace, Book(), NOW)
    budget, cases = namespace.budget, namespace.models

    def held(replicas: dict[str, int]) -> int:
        return sum(
            (max(replicas[name], case.live) + case.ending) * case.gpus
            for name, case in cases.items()
        )

    replicas = {name: each.replicas for name, each in done.decisions.items()}
    minimum = {
        name: max(min(replicas[name], case.observation.current), case.limits.minimum)
        for name, case in cases.items()
    }
    if budget.bound is not None:
        assert held(replicas) <= max(budget.bound, held(minimum))
    if budget.quota is not None:
        coming = sum(max(0, replicas[n] - cases[n].live) * cases[n].gpus for n in cases)
        at_least = sum(max(0, minimum[n] - cases[n].live) * cases[n].gpus for n in cases)
        assert coming <= max(budget.quota - budget.quota_used, at_least)


@given(namespaces())
def test_a_budget_is_kept_by_all_that_can_be_taken_back(namespace):
    done = decide_all(namespace, Book(), NOW)
    bound = namespace.budget.bound
    if bound is None:
        return
    floor = total = 0
    for name, case in namespace.models.items():
        known = case.observation.metrics.state is MetricState.KNOWN
        total += done.decisions[name].replicas * case.gpus
        current = case.observation.current
        kept = max(case.limits.minimum, min(1, current) if known else current)
        floor += min(done.decisions[name].replicas, kept) * case.gpus
    assert total <= max(bound, floor)


@given(namespaces())
def test_nobody_gets_more_than_alone_and_limits_hold(namespace):
    done = decide_all(namespace, Book(), NOW)
    for name, case in namespace.models.items():
        decision = done.decisions[name]
        alone = decide(case.observation, case.limits, case.history, NOW)
        assert decision.wanted == alone.wanted
        assert case.limits.minimum <= decision.replicas <= max(alone.replicas, 0)
        if case.observation.metrics.state is not MetricState.KNOWN:
            assert decision.replicas >= min(case.observation.current, case.limits.maximum)


@given(namespaces())
def test_a_workflow_never_comes_up_in_part(namespace):
    namespace = replace(
        namespace,
        workflows={n: replace(w, held=w.held or 0.0) for n, w in namespace.workflows.items()},
    )
    done = decide_all(namespace, Book(), NOW).decisions
    woken = {
        name
        for name, each in done.items()
        if each.replicas > 0 == namespace.models[name].observation.current
        and namespace.models[name].limits.minimum == 0
    }
    needed = {
        name
        for name, case in namespace.models.items()
        if case.observation.current == 0 and done[name].wanted > 0
    }
    groups = [
        workflow.models & needed for workflow in namespace.workflows.values() if workflow.held
    ]
    for name in woken:
        mine = [group for group in groups if name in group]
        assert not mine or any(all(done[m].replicas > 0 for m in group) for group in mine)


@given(namespaces(), st.randoms())
def test_the_order_of_the_mappings_does_not_matter(namespace, random):
    models, workflows = list(namespace.models.items()), list(namespace.workflows.items())
    random.shuffle(models)
    random.shuffle(workflows)
    shuffled = Namespace(dict(models), dict(workflows), namespace.budget)
    assert decide_all(shuffled, Book(), NOW) == decide_all(namespace, Book(), NOW)


@settings(max_examples=30)
@given(namespaces(), st.integers(0, 4))
def test_constant_demand_comes_to_rest(namespace, drain):
    models = {
        name: replace(
            case,
            observation=replace(case.observation, stuck=0),
            live=case.observation.current,
            ending=0,
        )
        for name, case in namespace.models.items()
    }
    world = World(replace(namespace, models=models), drain=drain)
    seen = []
    for _ in range(460):
        world.tick()
        seen.append(tuple(world.replicas().values()))
    assert len(set(seen[-20:])) == 1
