# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""When a second node computes a part of a lease's steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kubediffusion.scheduling.assist import (
    DIVIDED,
    LONGEST_PATIENCE,
    Division,
    branch_helper,
    control_helper,
    patience,
    place_apart,
    saving,
)
from kubediffusion.scheduling.fleet import NodeState
from kubediffusion.scheduling.placement import PlacementTask
from kubediffusion.scheduling.profiles import Profiles

DIT = Division("dit", units=20.0, steps=20, latent_bytes=1_000_000)


def node(name: str, *ready: str, **fields: object) -> NodeState:
    models = frozenset(ready or ("dit",))
    return replace(
        NodeState(name, host_id="h", fingerprint="f", ready=models),
        **fields,  # type: ignore[arg-type]
    )


def measured(step_seconds: float, bytes_per_second: float = 1e9) -> Profiles:
    profiles = Profiles()
    profiles.observe_run("dit", "denoise", "f", DIT.units, step_seconds * DIT.steps)
    for same_host in (True, False):
        profiles.observe_transfer(same_host, int(bytes_per_second), 1.0)
    return profiles


def test_half_a_step_is_saved_and_two_transfers_are_paid() -> None:
    gain = saving(DIT, node("a"), node("b"), measured(0.1))
    assert gain == pytest.approx(0.05 - 2 * 0.001 - 0.003)


def test_nothing_is_known_before_a_step_was_measured() -> None:
    assert saving(DIT, node("a"), node("b"), Profiles()) == 0.0
    assert branch_helper(DIT, node("a"), [node("b")], Profiles(), 0.0) is None


@pytest.mark.parametrize(
    ("step_seconds", "bytes_per_second", "helps"),
    [(0.1, 1e9, True), (0.005, 1e9, False), (0.1, 1e7, False)],
)
def test_a_branch_is_given_away_where_that_saves_time(
    step_seconds: float, bytes_per_second: float, helps: bool
) -> None:
    profiles = measured(step_seconds, bytes_per_second)
    assert (branch_helper(DIT, node("a"), [node("b")], profiles, 0.0) is not None) is helps


def test_what_divided_steps_took_counts_more_than_what_was_thought() -> None:
    profiles = measured(0.1)
    profiles.observe_run("dit", DIVIDED, "f", DIT.units, 0.12 * DIT.steps)
    assert saving(DIT, node("a"), node("b"), profiles) == pytest.approx(-0.02)
    assert branch_helper(DIT, node("a"), [node("b")], profiles, 0.0) is None


@pytest.mark.parametrize(
    "busy",
    [
        {"queued": 1},
        {"running": 1},
        {"helping": 1},
        {"queue_seconds": 0.1},
        {"suspect": True},
        {"draining": True},
        {"full_until": 5.0},
        {"ready": frozenset({"vae"})},
    ],
)
def test_only_an_idle_node_with_the_model_helps(busy: dict[str, object]) -> None:
    assert branch_helper(DIT, node("a"), [node("b", **busy)], measured(0.1), 0.0) is None


def test_a_lease_does_not_help_itself_and_near_nodes_come_first() -> None:
    profiles = measured(0.1)
    profiles.observe_transfer(False, 10_000_000, 1.0)
    far, near = node("b", host_id="other"), node("c")
    found = branch_helper(DIT, node("a"), [node("a"), far, near], profiles, 0.0)
    assert found is near


def test_nodes_that_help_alike_take_turns() -> None:
    nodes = [node("b", last_placed=2), node("c", last_placed=1)]
    found = branch_helper(DIT, node("a"), nodes, measured(0.1), 0.0)
    assert found is nodes[1]


def test_residuals_come_from_an_equal_node_where_bits_count() -> None:
    other, equal = node("b", "net", fingerprint="g"), node("c", "net", queue_seconds=9.0)
    lease = node("a")
    assert control_helper("net", lease, [other, equal], exact=True, now=0.0) is equal
    assert control_helper("net", lease, [other, equal], exact=False, now=0.0) is other
    assert control_helper("net", lease, [other], exact=True, now=0.0) is None


def test_a_lease_is_placed_apart_from_a_control_net_that_no_node_has_beside_it() -> None:
    lease, net = node("a"), node("b", "net")
    task = PlacementTask("dit", "denoise", helpers=("net",))

    def places(task: PlacementTask, *fleet: NodeState, alone: bool = True) -> list[NodeState]:
        return place_apart(task, fleet, fleet, lambda _: alone, 0.0)[1]

    assert places(task, lease, net) == [lease]
    assert places(task, lease) == []
    assert places(task, lease, net, alone=False) == []
    assert places(task, lease, replace(net, fingerprint="g")) == []
    several = replace(task, helpers=("net", "net2"))
    assert places(several, lease, node("b", "net", "net2")) == []
    first = node("a", "dit", "net")
    assert places(several, first, node("b", "net2")) == [first]


def test_patience_grows_with_the_own_half_and_a_first_answer_may_take_longer() -> None:
    assert patience(0.01, answered=True, required=False) == 0.25
    assert patience(1.0, answered=True, required=False) == 4.0
    assert patience(0.01, answered=False, required=False) == 5.0
    assert patience(0.01, answered=True, required=True) == LONGEST_PATIENCE
