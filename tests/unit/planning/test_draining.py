# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a revision keeps after another one has taken over, and what the new one waits for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kubediffusion_operator.planning import Plan, PlanCache
from kubediffusion_operator.planning.draining import MOST_REVISIONS, MOST_SECONDS
from tests.unit.planning.world import World

INK = {"name": "ink", "source": {"uri": "hf://org/ink"}}


@pytest.fixture
def world() -> World:
    return World()


def use(world: World, model: str, **spec: Any) -> str:
    """The transformer of that source, served; its name."""
    models = {"transformer": {"source": {"uri": f"hf://org/{model}"}}}
    world.workflow("w", models=models, **spec)
    world.settle()
    return world.role("w", "transformer")


def there(world: World, *names: str) -> list[bool]:
    return [name in world.all("Deployment") for name in names]


def draining(world: World) -> list[str]:
    status = world.status("DiffusionWorkflow", "w")
    entries = [each["revision"] for each in status.get("draining", [])]
    assert status.get("previousRevision") == (entries[0] if entries else None)
    return entries


def told(made: Plan) -> dict[str, list[str]]:
    """LoRAs by pod, where nodes are told something."""
    return {
        write.pod: [
            lora["name"] for spec in write.content["models"] for lora in spec.get("loras", ())
        ]
        for write in made.residency
    }


def rounds(world: World, count: int = 8) -> Iterator[Plan]:
    for _ in range(count):
        made = world.plan()
        yield made
        world.carry_out(made)
        world.collect()
        world.run_pods()


# ---------------------------------------------------------------- LoRAs


@pytest.mark.parametrize("pooled", [False, True])
def test_a_lora_is_served_when_every_node_knows_of_it(world: World, pooled: bool) -> None:
    world.put("ModelPool", "pool", {"replicas": 2})
    scaling = {"minReplicas": 2, "maxReplicas": 2}
    override = {"scaling": scaling, **({"placement": {"pool": "pool"}} if pooled else {})}
    world.workflow("w", models={"transformer": override})
    world.settle()
    before = world.status("DiffusionWorkflow", "w")["revision"]
    world.workflow("w", models={"transformer": override}, loras=[INK])
    hosts = "pool-pool" if pooled else world.role("w", "transformer")
    # Two text encoders take LoRAs too.
    nodes = {f"{world.role('w', role)}-0" for role in ("text_encoder", "text_encoder_2")}
    nodes |= {f"{hosts}-0", f"{hosts}-1"}
    known: set[str] = set()
    waits: list[str] = []
    for made in rounds(world, 10):
        status = made.status.get(("DiffusionWorkflow", "w"), {})
        now = world.status("DiffusionWorkflow", "w")["revision"]
        if status.get("revision", now) != before:
            break
        waits.append(world.condition("DiffusionWorkflow", "w", "Progressing")["message"])
        # One node after the other is told, in each round one.
        telling = sorted(pod for pod, names in told(made).items() if "ink" in names)
        made.residency = [w for w in made.residency if w.pod not in telling[1:]]
        known |= {*telling[:1]}
    assert known == nodes
    assert waits[-1].endswith(" to know its LoRAs")


def test_a_node_that_refused_the_plan_does_not_know_of_it(world: World) -> None:
    world.workflow("w")
    world.settle()
    before = world.status("DiffusionWorkflow", "w")["revision"]
    world.workflow("w", loras=[INK])
    answer, world.answer = world.answer, lambda made: None
    for _ in rounds(world):
        pass
    assert world.status("DiffusionWorkflow", "w")["revision"] == before
    world.answer = answer
    world.settle()
    assert world.status("DiffusionWorkflow", "w")["revision"] != before


def test_a_lora_that_is_taken_away_stays_known_for_the_requests_that_name_it(world: World) -> None:
    world.workflow("w", loras=[INK])
    world.settle()
    dit = world.role("w", "transformer")
    world.wait(5)
    world.workflow("w")
    world.settle()
    assert len(draining(world)) == 1
    assert [each["name"] for each in world.get("DiffusionModel", dit)["spec"]["loras"]] == ["ink"]
    world.tasks[dit] = 3
    world.wait(125)
    world.settle()
    assert world.get("DiffusionModel", dit)["spec"]["loras"]
    world.tasks[dit] = 0
    world.settle()
    assert "loras" not in world.get("DiffusionModel", dit)["spec"]
    assert draining(world) == []


def test_a_lora_that_another_workflow_declares_too_needs_no_drain(world: World) -> None:
    world.workflow("other", loras=[INK])
    world.workflow("w", loras=[INK])
    world.settle()
    world.workflow("w")
    world.settle()
    assert draining(world) == []


def test_a_lora_that_a_handmade_model_does_not_declare_is_told(world: World) -> None:
    world.workflow("w")
    world.settle()
    name = world.role("w", "transformer")
    found = world.get("DiffusionModel", name)
    world.delete("DiffusionWorkflow", "w")
    world.collect()
    world.put("DiffusionModel", name, found["spec"])
    world.workflow("w", loras=[INK])
    world.settle()
    told = world.condition("DiffusionWorkflow", "w", "OverrideConflict")
    assert "models.transformer.loras" in told["message"]
    assert "made by hand" in told["message"]
    world.set_spec("DiffusionModel", name, loras=[INK])
    world.settle()
    assert not world.condition("DiffusionWorkflow", "w", "OverrideConflict")


# ---------------------------------------------------------------- models


def test_two_quick_edits_keep_both_old_revisions_each_for_its_own_time(world: World) -> None:
    a = use(world, "a")
    world.wait(5)
    b = use(world, "b")
    world.wait(50)
    c = use(world, "c")
    assert there(world, a, b, c) == [True, True, True]
    assert len(draining(world)) == 2
    world.wait(70)
    assert world.settle().requeue_after == 50
    assert there(world, a, b, c) == [False, True, True]
    world.wait(50)
    assert world.settle().requeue_after is None
    assert there(world, a, b, c) == [False, False, True]
    assert draining(world) == []


def test_a_revision_that_never_served_drains_nothing(world: World) -> None:
    a = use(world, "a")
    world.workflow("w", models={"transformer": {"source": {"uri": "hf://org/b"}}})
    for _ in range(3):
        world.carry_out(world.plan())
    b = world.role("w", "transformer")
    world.unready.add(b)
    world.settle()
    c = use(world, "c")
    assert there(world, a, b, c) == [True, False, True]
    assert len(draining(world)) == 1


def test_old_models_stay_while_their_nodes_have_tasks(world: World) -> None:
    old = use(world, "a")
    use(world, "b")
    world.tasks[old] = 1
    world.wait(121)
    made = world.settle()
    assert [look.pod for look in made.looks] == [f"{old}-0"]
    assert made.requeue_after == 2
    world.wait(600)
    assert not world.settle().writes
    assert there(world, old) == [True]
    world.tasks[old] = 0
    world.settle()
    assert there(world, old) == [False]


def test_old_models_stay_while_gateways_need_them_for_requests_that_have_no_task_there(
    world: World,
) -> None:
    """They are at their text encoders, and the new revision needs those just the same."""
    old = use(world, "a")
    use(world, "b")
    world.needed = {old, world.role("w", "text_encoder")}
    world.wait(121)
    made = world.settle()
    assert [look.pod for look in made.looks] == [f"{old}-0"]
    assert there(world, old) == [True]
    world.needed.remove(old)
    world.settle()
    assert there(world, old) == [False]


def test_no_gateway_holds_a_model_for_ever(world: World) -> None:
    old = use(world, "a")
    use(world, "b")
    world.needed = {old}
    world.wait(MOST_SECONDS - 1)
    world.settle()
    assert there(world, old) == [True]
    world.wait(1)
    world.settle()
    assert there(world, old) == [False]


def test_what_a_node_said_before_the_time_was_over_counts_for_nothing(world: World) -> None:
    use(world, "a")
    use(world, "b")
    world.wait(121)
    made = world.plan()
    assert made.looks
    assert not made.delete


def test_nodes_that_never_say_that_they_are_idle_hold_a_model_for_so_long(world: World) -> None:
    old = use(world, "a")
    use(world, "b")
    world.residency = {}
    world.answer = lambda made: None  # type: ignore[method-assign]
    world.wait(MOST_SECONDS - 1)
    assert not world.plan().delete
    world.wait(1)
    assert old in {ref.name for ref in world.plan().delete}


def test_nodes_of_an_older_version_do_not_say_and_get_the_drain_time(world: World) -> None:
    old = use(world, "a")
    use(world, "b")
    world.tasks[old] = None
    world.wait(119)
    world.settle()
    assert there(world, old) == [True]
    world.wait(1)
    world.settle()
    assert there(world, old) == [False]


def test_going_back_during_a_drain_takes_the_models_that_are_still_there(world: World) -> None:
    a = use(world, "a")
    first = world.status("DiffusionWorkflow", "w")["revision"]
    b = use(world, "b")
    second = world.status("DiffusionWorkflow", "w")["revision"]
    world.wait(60)
    uid = world.get("Deployment", a)["metadata"]["uid"]
    assert use(world, "a") == a
    assert world.status("DiffusionWorkflow", "w")["revision"] == first
    assert draining(world) == [second]
    world.wait(90)  # the first one's drain would be over, had it gone on
    world.settle()
    assert there(world, a, b) == [True, True]
    world.wait(30)
    world.settle()
    assert there(world, a, b) == [True, False]
    assert world.get("Deployment", a)["metadata"]["uid"] == uid


def test_a_model_that_another_workflow_uses_needs_no_drain(world: World) -> None:
    a = use(world, "a")
    world.workflow("other", models={"transformer": {"source": {"uri": "hf://org/a"}}})
    world.settle()
    use(world, "b")
    assert draining(world) == []
    assert there(world, a) == [True]


def test_only_so_many_revisions_drain(world: World) -> None:
    names = [use(world, f"m{number}") for number in range(MOST_REVISIONS + 3)]
    assert len(draining(world)) == MOST_REVISIONS
    assert there(world, *names) == [False] * 2 + [True] * (MOST_REVISIONS + 1)


def test_the_status_of_an_older_operator_is_understood(world: World) -> None:
    old = use(world, "a")
    use(world, "b")
    status = dict(world.status("DiffusionWorkflow", "w"))
    del status["draining"]
    world.edit("DiffusionWorkflow", "w", status=status)
    world.cache = PlanCache()
    world.wait(60)
    assert world.settle().requeue_after == 60
    assert len(draining(world)) == 1
    world.wait(60)
    world.settle()
    assert there(world, old) == [False]


def test_replace_waits_for_the_last_requests_and_no_longer_than_the_drain_time(
    world: World,
) -> None:
    old = use(world, "a", strategy="Replace")
    world.tasks[old] = 2
    new = use(world, "b", strategy="Replace")
    assert there(world, old, new) == [True, False]
    assert world.condition("DiffusionModel", new, "Ready")["reason"] == "WaitingForOldModels"
    world.wait(5)
    world.settle()
    assert there(world, old, new) == [True, False]
    world.tasks[old] = 0
    world.settle()
    assert there(world, old, new) == [False, True]
    world.tasks[new] = 1
    world.wait(1)
    newest = use(world, "c", strategy="Replace")
    world.wait(120)
    world.settle()
    assert there(world, new, newest) == [False, True]
    assert world.condition("DiffusionWorkflow", "w", "Ready")["status"] == "True"


def test_replace_with_another_lora_alone_waits_for_the_nodes_and_takes_nothing_away(
    world: World,
) -> None:
    world.workflow("w", strategy="Replace")
    world.settle()
    pods = {name: pod["metadata"]["uid"] for name, pod in world.all("Pod").items()}
    before = world.status("DiffusionWorkflow", "w")["revision"]
    world.workflow("w", strategy="Replace", loras=[INK])
    for made in rounds(world, 2):
        assert made.status.get(("DiffusionWorkflow", "w"), {}).get("revision", before) == before
    world.settle()
    assert world.status("DiffusionWorkflow", "w")["revision"] != before
    assert {name: pod["metadata"]["uid"] for name, pod in world.all("Pod").items()} == pods
