# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Placement is right for any fleet: properties, and the cases that shaped it."""

from __future__ import annotations

from dataclasses import replace

from any_fleet import NOW, fleets, tasks
from hypothesis import given
from hypothesis import strategies as st

from kubediffusion.scheduling.fleet import NodeState, serving
from kubediffusion.scheduling.placement import PlacementTask, place
from kubediffusion.scheduling.profiles import CostDefaults, Profiles


@given(fleets(), tasks)
def test_a_placement_is_on_a_node_that_can_run_it(nodes, task):
    placement = place(task, nodes, Profiles(), NOW)
    by_address = {node.address: node for node in nodes}
    if placement is None:
        for node in nodes:
            able = all(m in node.ready or m in node.loading for m in (task.model, *task.helpers))
            assert node.draining or node.full_until > NOW or not able
        return
    node = by_address[placement.address]
    assert not node.draining
    assert node.full_until <= NOW
    wanted = {task.model, *task.helpers}
    assert wanted <= node.ready | set(node.loading)
    assert placement.ready == (wanted <= node.ready)
    assert placement.seconds >= node.queue_seconds


@given(fleets(), tasks)
def test_suspect_and_failed_nodes_are_a_last_resort(nodes, task):
    placement = place(task, nodes, Profiles(), NOW)
    if placement is None:
        return
    node = next(node for node in nodes if node.address == placement.address)
    if node.suspect or node.address in task.failed_on:
        others = [n for n in nodes if not n.suspect and n.address not in task.failed_on]
        assert place(task, others, Profiles(), NOW) is None


@given(fleets(), tasks, st.randoms())
def test_the_order_of_the_nodes_does_not_matter(nodes, task, random):
    shuffled = list(nodes)
    random.shuffle(shuffled)
    assert place(task, nodes, Profiles(), NOW) == place(task, shuffled, Profiles(), NOW)


@given(fleets(), tasks)
def test_more_queue_on_the_chosen_node_never_brings_it_more_work(nodes, task):
    placement = place(task, nodes, Profiles(), NOW)
    if placement is None:
        return
    busier = [
        replace(node, queue_seconds=node.queue_seconds + 10)
        if node.address != placement.address
        else node
        for node in nodes
    ]
    again = place(task, busier, Profiles(), NOW)
    assert again is not None
    assert again.address == placement.address


def node(address: str, **more) -> NodeState:
    return NodeState(address, ready=frozenset({"a"}), host_id="h", fingerprint="f", **more)


def test_equal_nodes_take_turns():
    nodes = {name: node(name) for name in ("n1", "n2", "n3")}
    order = []
    for serial in range(1, 7):
        placement = place(PlacementTask("a", "encode"), list(nodes.values()), Profiles(), NOW)
        assert placement is not None
        order.append(placement.address)
        nodes[placement.address] = replace(nodes[placement.address], last_placed=serial)
    assert order == ["n1", "n2", "n3"] * 2


def test_a_short_queue_elsewhere_beats_large_inputs_only_where_the_transfer_is_cheaper():
    profiles = Profiles(CostDefaults(same_host_bytes_per_second=1e9))
    nodes = [node("here", queue_seconds=2.0), node("there")]
    small = PlacementTask("a", "decode", inputs={"here": 10**9})
    large = PlacementTask("a", "decode", inputs={"here": 3 * 10**9})
    assert place(small, nodes, profiles, NOW).address == "there"
    assert place(large, nodes, profiles, NOW).address == "here"


def test_a_checkpoint_draws_its_task_to_an_equal_fingerprint_unless_the_queue_is_longer():
    profiles = Profiles(CostDefaults(run_seconds=10.0))
    task = PlacementTask("a", "denoise", resume_fingerprint="f", resume_fraction=0.1)
    equal, other = node("n2"), replace(node("n1"), fingerprint="g")
    chosen = place(task, [other, equal], profiles, NOW)
    assert (chosen.address, chosen.resumes, chosen.run_seconds) == ("n2", True, 1.0)
    chosen = place(task, [other, replace(equal, queue_seconds=20)], profiles, NOW)
    assert (chosen.address, chosen.resumes, chosen.run_seconds) == ("n1", False, 10.0)


def test_waiting_for_a_node_that_is_nearly_loaded_may_be_best():
    profiles = Profiles(CostDefaults(load_seconds=10.0))
    busy = node("n1", queue_seconds=100.0)
    loading = NodeState("n2", loading={"a": NOW - 9})
    chosen = place(PlacementTask("a", "encode"), [busy, loading], profiles, NOW)
    assert (chosen.address, chosen.ready) == ("n2", False)
    stuck = replace(loading, loading={"a": NOW - 200})
    assert place(PlacementTask("a", "encode"), [busy, stuck], profiles, NOW).address == "n1"


def test_a_draining_node_serves_nothing():
    nodes = [node("n1"), node("n2", draining=True)]
    assert [n.address for n in serving(nodes, "a")] == ["n1"]
    assert serving(nodes, "b") == []
