# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Workflows that share models: who decides, who is told, and what stays when one goes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.planning.world import World

ROLES = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")


def models(transformer: dict[str, Any]) -> dict[str, Any]:
    return {"transformer": transformer}


def scaled(low: int, high: int, **more: Any) -> dict[str, Any]:
    return {"scaling": {"minReplicas": low, "maxReplicas": high, **more}}


@pytest.fixture
def world() -> World:
    return World()


def pair(world: World, older: dict[str, Any], younger: dict[str, Any]) -> str:
    """Two workflows of the same weights; the name of their transformer."""
    world.workflow("older", models=models(older))
    world.wait(1)
    world.workflow("younger", models=models(younger))
    world.settle()
    return world.role("older", "transformer")


def test_equal_models_are_one(world: World) -> None:
    pair(world, {}, {})
    assert len(world.all("DiffusionModel")) == len(world.all("Deployment")) == len(ROLES)
    for role in ROLES:
        assert world.role("older", role) == world.role("younger", role)
    model = world.get("DiffusionModel", world.role("older", "vae"))
    assert [owner["name"] for owner in model["metadata"]["ownerReferences"]] == [
        "older",
        "younger",
    ]
    assert model["status"]["referencedBy"] == [
        {"name": "older", "role": "vae"},
        {"name": "younger", "role": "vae"},
    ]


def test_another_source_of_one_role_is_one_more_model(world: World) -> None:
    other = {"source": {"uri": "hf://org/tuned", "subfolder": "transformer"}}
    pair(world, {}, other)
    assert len(world.all("DiffusionModel")) == len(ROLES) + 1
    assert world.role("older", "transformer") != world.role("younger", "transformer")
    assert world.role("older", "vae") == world.role("younger", "vae")


def test_a_slash_more_in_a_uri_changes_nothing_whoever_goes(world: World) -> None:
    """A model's source cannot change, and its identity does not know of slashes."""
    source = {"uri": "hf://org/tuned/", "subfolder": "transformer"}
    name = pair(world, {"source": source}, {"source": {**source, "uri": "hf://org/tuned"}})
    before = world.get("DiffusionModel", name)["spec"]
    assert before["source"]["uri"] == "hf://org/tuned"
    world.delete("DiffusionWorkflow", "older")
    world.settle()
    assert world.get("DiffusionModel", name)["spec"] == before


def test_the_last_user_takes_its_models_along(world: World) -> None:
    world.workflow("one")
    world.workflow("two", models={"text_encoder_3": {"enabled": False}})
    world.settle()
    t5 = world.role("one", "text_encoder_3")
    world.delete("DiffusionWorkflow", "one")
    world.settle()
    assert t5 not in world.all("DiffusionModel")
    assert len(world.all("DiffusionModel")) == len(ROLES) - 1
    world.delete("DiffusionWorkflow", "two")
    world.settle()
    assert not world.objects


@pytest.mark.parametrize(
    ("older", "younger", "merged"),
    [
        ((0, 2), (1, 1), (1, 2)),
        ((2, 2), (0, 5), (2, 5)),
        ((0, 1), (0, 3), (0, 3)),
        ((3, 3), (1, 2), (3, 3)),
    ],
)
def test_the_larger_minimum_and_the_larger_maximum_count(
    world: World, older: tuple[int, int], younger: tuple[int, int], merged: tuple[int, int]
) -> None:
    name = pair(world, scaled(*older), scaled(*younger))
    scaling = world.get("DiffusionModel", name)["spec"]["scaling"]
    assert (scaling["minReplicas"], scaling["maxReplicas"]) == merged
    assert not world.condition("DiffusionWorkflow", "younger", "OverrideConflict")


def test_zero_only_where_all_ask_for_it(world: World) -> None:
    name = pair(world, scaled(0, 4), {})
    assert world.get("DiffusionModel", name)["spec"]["scaling"]["minReplicas"] == 1
    world.delete("DiffusionWorkflow", "younger")
    world.settle()
    assert world.get("DiffusionModel", name)["spec"]["scaling"]["minReplicas"] == 0


def test_without_scaling_nobody_bounds_a_model(world: World) -> None:
    assert "scaling" not in world.get("DiffusionModel", pair(world, {}, {}))["spec"]


OLDEST = {
    "resources": ({"limits": {"memory": "8Gi"}}, {"limits": {"memory": "4Gi"}}),
    "placement": ({"pool": "a"}, {"pool": "b"}),
    "podTemplate": ({"spec": {"nodeSelector": {"a": "1"}}}, {"spec": {"nodeSelector": {"a": "2"}}}),
    "drainSeconds": (60, 30),
}


@pytest.mark.parametrize("field", OLDEST)
def test_the_oldest_decides_and_the_younger_is_told(world: World, field: str) -> None:
    first, second = OLDEST[field]
    world.put("ModelPool", "a", {"replicas": 1})
    world.put("ModelPool", "b", {"replicas": 1})
    name = pair(world, {field: first}, {field: second})
    assert world.get("DiffusionModel", name)["spec"][field] == first
    told = world.condition("DiffusionWorkflow", "younger", "OverrideConflict")
    assert told["status"] == "True"
    assert told["reason"] == "OldestDecides"
    assert f"models.transformer.{field}: the model is shared with older" in told["message"]
    assert not world.condition("DiffusionWorkflow", "older", "OverrideConflict")
    # Once the older is gone the other decides, and has nothing to complain of.
    world.delete("DiffusionWorkflow", "older")
    world.settle()
    assert world.get("DiffusionModel", name)["spec"][field] == second
    assert not world.condition("DiffusionWorkflow", "younger", "OverrideConflict")


@pytest.mark.parametrize("field", OLDEST)
def test_who_comes_later_does_not_move_what_others_run_on(world: World, field: str) -> None:
    """The oldest decides by saying nothing too."""
    world.workflow("older")
    world.settle()
    name = world.role("older", "transformer")
    before = world.get("Deployment", name)["spec"]
    world.wait(1)
    world.workflow("younger", models=models({field: OLDEST[field][1]}))
    world.settle()
    assert world.get("Deployment", name)["spec"] == before
    assert world.condition("DiffusionWorkflow", "younger", "OverrideConflict")["status"] == "True"


def test_the_same_word_twice_is_no_conflict(world: World) -> None:
    said = {"resources": OLDEST["resources"][0]}
    pair(world, said, said)
    assert not world.condition("DiffusionWorkflow", "younger", "OverrideConflict")


def test_how_to_scale_is_the_oldests_word_too(world: World) -> None:
    name = pair(world, scaled(1, 2, mode="external"), scaled(1, 2, targetPerReplica="9"))
    scaling = world.get("DiffusionModel", name)["spec"]["scaling"]
    assert (scaling["mode"], scaling["targetPerReplica"]) == ("external", "2")
    told = world.condition("DiffusionWorkflow", "younger", "OverrideConflict")["message"]
    assert "scaling.mode" in told
    assert "scaling.targetPerReplica" in told


def lora(name: str, repository: str) -> dict[str, Any]:
    return {"name": name, "source": {"uri": f"hf://org/{repository}"}}


def test_loras_of_all_users_are_declared_without_a_new_pod(world: World) -> None:
    world.workflow("one", loras=[lora("ink", "a"), lora("wash", "w")])
    world.settle()
    name = world.role("one", "transformer")
    template = world.get("Deployment", name)["spec"]["template"]
    told = world.get("ConfigMap", name)["data"]
    world.wait(1)
    world.workflow("two", loras=[lora("ink", "b"), lora("wash", "w")])
    made = world.plan()
    world.settle()
    declared = world.get("DiffusionModel", name)["spec"]["loras"]
    # Two of one name are two; nodes tell them apart by their sources.
    assert [(each["name"], each["source"]["uri"]) for each in declared] == [
        ("ink", "hf://org/a"),
        ("ink", "hf://org/b"),
        ("wash", "hf://org/w"),
    ]
    assert world.get("Deployment", name)["spec"]["template"] == template
    assert world.get("ConfigMap", name)["data"] != told
    assert made.resolve
    # The node was told, under a higher number.
    (report,) = [
        world.residency[pod["metadata"]["uid"]]
        for pod in world.all("Pod").values()
        if pod["metadata"]["labels"].get("kubediffusion.io/model") == name
    ]
    assert report.generation > 1


def test_a_model_made_by_hand_keeps_its_own_word(world: World) -> None:
    world.workflow("first")
    world.settle()
    name = world.role("first", "vae")
    spec = {**world.get("DiffusionModel", name)["spec"], "drainSeconds": 7, "replicas": 2}
    world.delete("DiffusionWorkflow", "first")
    world.settle()
    world.put("DiffusionModel", name, spec)
    world.wait(1)
    world.workflow("second", models={"vae": {"drainSeconds": 9}})
    world.settle()
    model = world.get("DiffusionModel", name)
    assert model["spec"]["drainSeconds"] == 7
    assert "ownerReferences" not in model["metadata"]
    assert model["status"]["referencedBy"] == [{"name": "second", "role": "vae"}]
    told = world.condition("DiffusionWorkflow", "second", "OverrideConflict")["message"]
    assert told == "models.vae.drainSeconds: the DiffusionModel was made by hand and says it"
    world.delete("DiffusionWorkflow", "second")
    world.settle()
    assert list(world.all("DiffusionModel")) == [name]
    assert world.get("Deployment", name)["spec"]["replicas"] == 2


def test_a_model_under_a_name_that_is_not_its_identity_serves_nobody(world: World) -> None:
    world.workflow("first")
    world.settle()
    right = world.role("first", "vae")
    spec = {**world.get("DiffusionModel", right)["spec"]}
    world.put("DiffusionModel", "my-vae", spec)
    world.settle()
    assert "my-vae" not in world.all("Deployment")
    told = world.condition("DiffusionModel", "my-vae", "Ready")
    assert (told["status"], told["reason"]) == ("False", "NameIsNotIdentity")
    assert right in told["message"]


def test_equal_weights_under_two_sources_are_pointed_out(world: World) -> None:
    world.workflow("one", models=models({"source": {"uri": "hf://org/a"}}))
    world.workflow("two", models=models({"source": {"uri": "hf://org/b"}}))
    made = world.settle()
    names = sorted(world.role(each, "transformer") for each in ("one", "two"))
    for _ in range(2):
        for uid, report in list(world.residency.items()):
            models_ = tuple(
                type(each)(each.identity, "READY", nbytes=1, digest="same")
                for each in report.models
            )
            world.residency[uid] = type(report)(report.restarts, report.generation, models_)
        made = world.settle()
    assert not made.writes
    told = world.condition("DiffusionModel", names[1], "EqualWeights")
    assert names[0] in told["message"]
    assert not world.condition("DiffusionModel", names[0], "EqualWeights")
    # The encoders have that digest too, and other arithmetic.
    assert not world.condition("DiffusionModel", world.role("one", "vae"), "EqualWeights")
