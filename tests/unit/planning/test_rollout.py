# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""From one revision of a workflow to the next, and back."""

from __future__ import annotations

from typing import Any

import pytest

from kubediffusion.workflow import PipelineIndex, decode, pinned_spec
from kubediffusion_operator.planning.types import Resolution, ResolutionError
from tests.unit.planning.world import INDEX, World


@pytest.fixture
def world() -> World:
    return World()


def use(world: World, model: str, **spec: Any) -> None:
    world.workflow("w", models={"transformer": {"source": {"uri": f"hf://org/{model}"}}}, **spec)


def served(world: World) -> str:
    """The transformer's source in the revision that gateways serve."""
    name = world.status("DiffusionWorkflow", "w")["revision"]
    data = world.get("ControllerRevision", name)["data"]
    return decode(data).models["transformer"].uri.rpartition("/")[2]


def transformer(world: World, model: str) -> str | None:
    """The name of the transformer from that source, where it is there."""
    found = [
        name
        for name, each in world.all("DiffusionModel").items()
        if each["spec"]["source"]["uri"] == f"hf://org/{model}"
    ]
    return found[0] if found else None


def test_the_first_revision_is_served_at_once(world: World) -> None:
    use(world, "a")
    world.carry_out(world.plan())
    world.carry_out(world.plan())
    assert served(world) == "a"
    assert world.condition("DiffusionWorkflow", "w", "Ready")["status"] == "False"


def test_the_new_one_takes_over_when_it_is_ready_and_not_before(world: World) -> None:
    use(world, "a")
    world.settle()
    old = transformer(world, "a")
    world.wait(5)
    use(world, "b")
    for _ in range(3):
        world.carry_out(world.plan())
    new = transformer(world, "b")
    assert new is not None
    world.unready.add(new)
    world.settle()
    assert served(world) == "a"
    told = world.condition("DiffusionWorkflow", "w", "Progressing")
    assert (told["status"], told["reason"]) == ("True", "RollingOut")
    assert told["message"].endswith("it waits for transformer")
    assert world.status("DiffusionWorkflow", "w")["ready"] == "4/5"
    assert world.condition("DiffusionWorkflow", "w", "Ready")["status"] == "True"
    assert old in world.all("Deployment")
    world.unready.clear()
    world.settle()
    assert served(world) == "b"


def test_the_old_ones_models_stay_for_their_drain_time(world: World) -> None:
    use(world, "a")
    world.settle()
    old = transformer(world, "a")
    world.wait(5)
    use(world, "b")
    made = world.settle()
    assert served(world) == "b"
    assert old in world.all("Deployment")
    assert made.requeue_after == 120
    assert world.condition("DiffusionWorkflow", "w", "Progressing")["reason"] == "Draining"
    world.wait(119)
    assert world.settle().requeue_after == 1
    world.wait(1)
    assert world.settle().requeue_after is None
    assert transformer(world, "a") is None
    assert old not in world.all("Deployment")
    assert world.condition("DiffusionWorkflow", "w", "Progressing")["reason"] == "UpToDate"


def test_an_edit_that_changes_no_model_needs_no_look_and_no_drain(world: World) -> None:
    use(world, "a")
    world.settle()
    world.wait(5)
    use(world, "a", slo={"deadlineSeconds": 9})
    assert not world.plan().resolve
    assert world.settle().requeue_after is None
    assert len(world.all("ControllerRevision")) == 2
    assert world.condition("DiffusionWorkflow", "w", "Progressing")["reason"] == "UpToDate"


def test_weights_change_only_where_a_source_was_touched(world: World) -> None:
    """A branch that moved meanwhile is not read again for another reason."""
    use(world, "a", source={"revision": "main"})
    world.settle()
    world.sources["w"] = Resolution(PipelineIndex(INDEX.components, "1" * 40))
    use(world, "a", source={"revision": "main"}, numerics="fast")
    world.settle()
    commits = {each["data"]["index"]["commit"] for each in world.all("ControllerRevision").values()}
    assert commits == {"0" * 40}
    use(world, "a", source={"revision": "v2"}, numerics="fast")
    world.settle()
    assert world.get("DiffusionModel", world.role("w", "vae"))["spec"]["source"]["revision"] == (
        "1" * 40
    )


def test_going_back_serves_the_same_weights_and_counts_on(world: World) -> None:
    use(world, "a", source={"revision": "main"})
    world.settle()
    first = world.get("ControllerRevision", world.status("DiffusionWorkflow", "w")["revision"])
    world.sources["w"] = Resolution(PipelineIndex(INDEX.components, "1" * 40))
    use(world, "b", source={"revision": "dev"})
    world.settle()
    world.put("DiffusionWorkflow", "w", pinned_spec(first["data"]))
    world.sources["w"] = Resolution(INDEX)
    world.settle()
    now = world.get("ControllerRevision", world.status("DiffusionWorkflow", "w")["revision"])
    assert now["revision"] == 3
    before, after = (
        {role: ref.identity for role, ref in decode(each["data"]).models.items()}
        for each in (first, now)
    )
    assert after == before


def test_the_very_same_spec_again_takes_its_old_revision(world: World) -> None:
    for name in ("a", "b", "a"):
        use(world, name)
        world.settle()
    revisions = world.all("ControllerRevision")
    assert len(revisions) == 2
    assert {each["revision"] for each in revisions.values()} == {2, 3}
    assert served(world) == "a"


def test_old_revisions_are_kept_to_the_limit_and_never_one_in_use(world: World) -> None:
    for number in range(8):
        use(world, "a", slo={"deadlineSeconds": number + 1}, revisionHistoryLimit=3)
        world.settle()
    numbers = sorted(each["revision"] for each in world.all("ControllerRevision").values())
    assert numbers == [5, 6, 7, 8]
    use(world, "b", revisionHistoryLimit=0)
    world.settle()
    # The one that still drains, and the one that is served.
    assert len(world.all("ControllerRevision")) == 2
    world.wait(500)
    world.settle()
    assert len(world.all("ControllerRevision")) == 1


def test_replace_takes_the_old_models_away_before_the_new_ones_come(world: World) -> None:
    use(world, "a", strategy="Replace")
    world.settle()
    old = transformer(world, "a")
    assert old is not None
    assert world.get("Deployment", old)["spec"]["strategy"] == {"type": "Recreate"}
    world.wait(5)
    use(world, "b", strategy="Replace")
    seen: list[tuple[bool, bool]] = []
    for _ in range(16):
        world.carry_out(world.plan())
        world.collect()
        new = transformer(world, "b")
        seen.append((f"{old}-0" in world.all("Pod"), new in world.all("Deployment")))
        if len(seen) == 6:
            # While requests for the old ones end, and gateways hold those for the new one already.
            assert world.get("Deployment", old)["spec"]["replicas"] == 1
            assert served(world) == "b"
            world.wait(5)
        if len(seen) == 10:
            # The pod took its time.
            assert world.get("Deployment", old)["spec"]["replicas"] == 0
            told = world.condition("DiffusionModel", str(new), "Ready")
            assert told["reason"] == "WaitingForOldModels"
            world.run_pods()
    assert not any(pod and deployment for pod, deployment in seen)
    assert seen[-1] == (False, True)
    world.settle()
    assert transformer(world, "a") is None
    assert world.condition("DiffusionWorkflow", "w", "Ready")["status"] == "True"


def test_replace_does_not_touch_what_another_workflow_uses(world: World) -> None:
    use(world, "a", strategy="Replace")
    world.workflow("other", models={"transformer": {"source": {"uri": "hf://org/a"}}})
    world.settle()
    use(world, "b", strategy="Replace")
    world.settle()
    assert transformer(world, "a") in world.all("Deployment")
    assert transformer(world, "b") in world.all("Deployment")


def test_a_source_that_cannot_be_read_says_why_and_keeps_what_is_served(world: World) -> None:
    use(world, "a")
    world.settle()
    world.sources["w"] = ResolutionError("Unauthorized", "give a token", "spec.pipeline.source")
    use(world, "b")
    world.settle()
    resolved = world.condition("DiffusionWorkflow", "w", "Resolved")
    assert (resolved["status"], resolved["reason"]) == ("False", "Unauthorized")
    assert resolved["message"] == "spec.pipeline.source: give a token"
    assert world.condition("DiffusionWorkflow", "w", "Ready")["status"] == "True"
    assert world.condition("DiffusionWorkflow", "w", "Degraded")["reason"] == "Unauthorized"
    assert world.status("DiffusionWorkflow", "w")["reason"] == "Unauthorized"
    assert served(world) == "a"
    assert [e.reason for e in world.events if e.type == "Warning"] == ["Unauthorized"]


def test_an_error_is_shown_until_it_is_due_and_asked_again_then(world: World) -> None:
    error = ResolutionError("Offline", "no network")
    world.sources["w"] = error
    use(world, "a")
    world.settle()
    assert world.condition("DiffusionWorkflow", "w", "Ready")["reason"] == "Offline"
    key = next(iter(world.resolutions))
    world.resolutions[key] = ResolutionError("Offline", "no network", due=True)
    made = world.plan()
    assert [each["metadata"]["name"] for each in made.resolve] == ["w"]
    assert not made.writes
    world.sources.clear()
    world.settle()
    assert world.condition("DiffusionWorkflow", "w", "Ready")["status"] == "True"


def test_a_workflow_its_pipeline_does_not_take(world: World) -> None:
    world.workflow("w", models={"text_encodr": {}})
    world.settle()
    resolved = world.condition("DiffusionWorkflow", "w", "Resolved")
    assert (resolved["status"], resolved["reason"]) == ("False", "InvalidWorkflow")
    assert "did you mean text_encoder" in resolved["message"]
    assert not world.all("DiffusionModel")


def test_revisions_that_cannot_be_read_take_nothing_away(world: World) -> None:
    """An older operator beside what a newer one wrote."""
    use(world, "a")
    world.settle()
    before = set(world.all("Deployment"))
    for name in world.all("ControllerRevision"):
        world.edit("ControllerRevision", name, data={"format": 99})
    world.resolutions.clear()
    world.sources["w"] = ResolutionError("Offline", "no network")
    for _ in range(3):
        made = world.plan()
        assert not made.delete
        world.carry_out(made)
    assert set(world.all("Deployment")) == before
