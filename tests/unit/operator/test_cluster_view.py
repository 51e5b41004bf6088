# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from kubediffusion.cluster.watch import Change
from kubediffusion_operator.cluster import EXPECTATION_SECONDS, Cluster


def made(version: int, uid: str = "u", name: str = "m", **extra: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": "ns", "uid": uid, "resourceVersion": str(version)}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, **extra}


class View:
    """A cluster, and the mirror of its one watch."""

    def __init__(self) -> None:
        self.now = 0.0
        self.marked: list[str] = []
        self.cluster = Cluster(self.marked.append, now=lambda: self.now)
        self.cluster.watch(None)  # pyright: ignore[reportArgumentType]
        self.mirror = self.cluster.watches["Deployment"]

    def event(self, new: dict[str, Any] | None, name: str = "m") -> None:
        name = new["metadata"]["name"] if new is not None else name
        old = self.mirror.objects.get(("ns", name))
        if new is None:
            self.mirror.objects.pop(("ns", name))
        else:
            self.mirror.objects["ns", name] = new
        self.mirror._on_change(Change(old, new))

    def version(self, name: str = "m") -> str | None:
        found = self.cluster.get("Deployment", "ns", name)
        return found["metadata"]["resourceVersion"] if found else None


@pytest.fixture
def view() -> View:
    return View()


def test_events_come_and_go_and_mark_their_namespace(view: View) -> None:
    view.event(made(1))
    assert view.version() == "1"
    assert view.cluster.namespaces() == {"ns"}
    view.event(made(2))
    view.event(None)
    assert view.version() is None
    assert view.cluster.namespaces() == set()
    assert view.marked == ["ns"] * 3


def test_an_older_event_does_not_undo_what_we_wrote(view: View) -> None:
    view.event(made(1))
    view.marked.clear()
    view.cluster.wrote(made(5))
    assert view.version() == "5"
    view.event(made(3))
    view.event(made(4))
    assert view.version() == "5"
    assert view.marked == []
    view.event(made(5))
    assert view.marked == []  # our own write is no news
    view.event(made(6))
    assert (view.version(), view.marked) == ("6", ["ns"])


def test_an_answer_that_is_older_than_an_event_is_not_taken_over(view: View) -> None:
    view.event(made(7))
    view.cluster.wrote(made(5))
    assert view.version() == "7"


def test_a_late_event_does_not_bring_back_what_we_deleted(view: View) -> None:
    view.event(made(1))
    view.cluster.deleted("Deployment", "ns", "m", "u")
    assert view.version() is None
    view.event(made(2))
    assert view.version() is None
    view.event(None)
    view.event(made(9, uid="another"))
    assert view.version() == "9"


def test_the_end_of_an_old_object_is_not_the_end_of_the_one_made_since(view: View) -> None:
    view.event(made(1))
    view.cluster.wrote(made(8, uid="another"))
    view.event(None)
    assert view.version() == "8"
    view.event(made(8, uid="another"))
    view.event(None)
    assert view.version() is None


def test_deleting_another_object_of_that_name_deletes_nothing(view: View) -> None:
    view.event(made(1))
    view.cluster.deleted("Deployment", "ns", "m", "another")
    assert view.version() == "1"


def test_what_no_watch_confirms_is_believed_for_a_while_only(view: View) -> None:
    # Made and deleted by somebody while the watch was down: it never tells of either.
    view.cluster.wrote(made(5))
    view.event(made(1, uid="v", name="kept"))
    view.cluster.deleted("Deployment", "ns", "kept", "v")
    view.marked.clear()
    view.now = EXPECTATION_SECONDS - 1
    view.cluster.expire()
    assert (view.version(), view.version("kept"), view.marked) == ("5", None, [])
    view.now = EXPECTATION_SECONDS + 1
    view.cluster.expire()
    assert (view.version(), view.version("kept")) == (None, "1")
    assert view.marked == ["ns", "ns"]


def test_a_confirmed_write_does_not_expire(view: View) -> None:
    view.cluster.wrote(made(5))
    view.event(made(5))
    view.now = 10 * EXPECTATION_SECONDS
    view.cluster.expire()
    assert view.version() == "5"


def test_what_nobody_reads_is_not_kept(view: View) -> None:
    last = "kubectl.kubernetes.io/last-applied-configuration"
    heavy = made(1)
    heavy["metadata"] |= {"managedFields": [1], "annotations": {last: "{}", "kept": "1"}}
    view.event(heavy)
    written = made(2, name="w")
    written["metadata"]["managedFields"] = [1]
    view.cluster.wrote(written)
    for name in ("m", "w"):
        found = view.cluster.get("Deployment", "ns", name)
        assert found is not None
        assert "managedFields" not in found["metadata"]
    found = view.cluster.get("Deployment", "ns", "m")
    assert found is not None
    assert found["metadata"]["annotations"] == {"kept": "1"}


def test_readiness_counts_the_condition() -> None:
    view = View()

    def workflow(name: str, *conditions: dict[str, str]) -> dict[str, Any]:
        found = made(1, name=name, uid=name, status={"conditions": list(conditions)})
        return {**found, "kind": "DiffusionWorkflow"}

    view.cluster.wrote(workflow("a", {"type": "Ready", "status": "True"}))
    view.cluster.wrote(workflow("b", {"type": "Ready", "status": "False"}))
    view.cluster.wrote(workflow("c", {"type": "Degraded", "status": "True"}))
    assert view.cluster.readiness("DiffusionWorkflow") == (1, 2)
