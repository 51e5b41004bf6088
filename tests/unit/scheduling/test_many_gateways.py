# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Gateways that place on the same nodes without talking to each other."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from any_fleet import NOW, fleets, tasks
from hypothesis import given
from hypothesis import strategies as st

from kubediffusion.scheduling.fleet import NodeState
from kubediffusion.scheduling.placement import NEARLY, PlacementTask, place
from kubediffusion.scheduling.profiles import CostDefaults, Profiles

draws = st.randoms(use_true_random=False)


def shared(nodes: list[NodeState]) -> list[NodeState]:
    return [replace(node, gateways=3) for node in nodes]


@given(fleets(), tasks, draws)
def test_alone_a_gateway_places_as_if_nothing_were_drawn(
    nodes: list[NodeState], task: PlacementTask, random: Random
) -> None:
    def draw() -> float:
        raise AssertionError("nothing is left to chance where nobody else places")

    assert place(task, nodes, Profiles(), NOW, draw) == place(task, nodes, Profiles(), NOW)


@given(fleets(), tasks, draws)
def test_chance_changes_neither_whether_a_task_is_placed_nor_who_may_take_it(
    nodes: list[NodeState], task: PlacementTask, random: Random
) -> None:
    best = place(task, nodes, Profiles(), NOW)
    drawn = place(task, shared(nodes), Profiles(), NOW, random.random)
    assert (best is None) == (drawn is None)
    if best is None or drawn is None:
        return
    taken, first = (
        next(node for node in nodes if node.address == each.address) for each in (drawn, best)
    )
    assert taken.takes_work(NOW)
    assert (taken.suspect or taken.address in task.failed_on) == (
        first.suspect or first.address in task.failed_on
    )
    assert drawn.seconds >= best.seconds


@given(fleets(), tasks, draws)
def test_a_node_that_cannot_be_the_best_is_never_drawn(
    nodes: list[NodeState], task: PlacementTask, random: Random
) -> None:
    """One that still loads while another is idle, or a slow one beside a fast one."""
    best = place(task, nodes, Profiles(), NOW)
    drawn = place(task, shared(nodes), Profiles(), NOW, random.random)
    if best is None or drawn is None:
        return
    queue = next(node.queue_seconds for node in nodes if node.address == drawn.address)
    assert drawn.seconds - queue <= NEARLY * best.seconds + 1e-9


@given(st.integers(2, 40), draws)
def test_of_equal_nodes_the_busiest_is_never_taken(count: int, random: Random) -> None:
    nodes = [
        NodeState(f"n{i}", ready=frozenset({"a"}), queue_seconds=float(i), gateways=2)
        for i in range(count)
    ]
    placement = place(PlacementTask("a", "denoise"), nodes, Profiles(), NOW, random.random)
    assert placement is not None
    assert placement.address != f"n{count - 1}"


def test_every_idle_node_is_taken_by_turns() -> None:
    nodes = [NodeState(f"n{i}", ready=frozenset({"a"}), gateways=2) for i in range(8)]
    random = Random(1)
    taken = {
        placement.address
        for _ in range(200)
        if (placement := place(PlacementTask("a", "x"), nodes, Profiles(), NOW, random.random))
    }
    # Ties go to the lower address, so the last of them never wins a pair; the rest all do.
    assert len(taken) == 7


# ---------------------------------------------------------------- a small simulation

RUN = 1.0
REPORT = 0.1


@dataclass
class Node:
    """Runs one task after the other, and reports every REPORT seconds."""

    free_at: float = 0.0
    reported: float = 0.0

    def queue(self, now: float) -> float:
        return max(0.0, self.free_at - now)

    def take(self, now: float) -> None:
        self.free_at = max(self.free_at, now) + RUN


@dataclass
class Gateway:
    """Knows of each node its last report, and what it has sent there itself since then."""

    random: Random
    sent: dict[str, float] = field(default_factory=dict[str, float])
    serials: dict[str, int] = field(default_factory=dict[str, int])
    serial: int = 0

    def place(
        self,
        nodes: dict[str, Node],
        profiles: Profiles,
        now: float,
        draw: Callable[[], float] | None,
    ) -> str:
        states = [
            NodeState(
                address,
                ready=frozenset({"a"}),
                queue_seconds=node.reported + self.sent.get(address, 0.0),
                last_placed=self.serials.get(address, 0),
                gateways=4,
            )
            for address, node in nodes.items()
        ]
        placement = place(PlacementTask("a", "denoise"), states, profiles, now, draw)
        assert placement is not None
        self.serial += 1
        self.serials[placement.address] = self.serial
        self.sent[placement.address] = self.sent.get(placement.address, 0.0) + RUN
        return placement.address


def steady(seed: int, gateways: int, two_choices: bool) -> list[float]:
    """The seconds that each task waited: 20 s of arrivals by chance, at 80 % load."""
    random = Random(seed)
    profiles = Profiles(CostDefaults(run_seconds=RUN))
    nodes = {f"n{i:02}": Node() for i in range(16)}
    doors = [Gateway(Random(seed * 1000 + i)) for i in range(gateways)]
    arrivals = [(random.random() * REPORT, i) for i in range(gateways)]
    heapq.heapify(arrivals)
    rate = 0.8 * len(nodes) / RUN / gateways
    next_report, waits = 0.0, list[float]()
    while arrivals[0][0] < 20.0:
        now, which = heapq.heappop(arrivals)
        while next_report <= now:
            report(nodes, doors, next_report)
            next_report += REPORT
        door = doors[which]
        address = door.place(nodes, profiles, now, door.random.random if two_choices else None)
        waits.append(nodes[address].queue(now))
        nodes[address].take(now)
        heapq.heappush(arrivals, (now + random.expovariate(rate), which))
    return waits


def bursts(seed: int, two_choices: bool) -> tuple[float, float]:
    """Each of 4 gateways gets 8 images at once, for 32 idle nodes. The most that one node had to
    run one after the other and the nodes that had nothing to do, on average over 40 such bursts."""
    profiles = Profiles(CostDefaults(run_seconds=RUN))
    doors = [Gateway(Random(seed * 1000 + i)) for i in range(4)]
    longest, idle = 0.0, 0
    for _ in range(40):
        nodes = {f"n{i:02}": Node() for i in range(32)}
        report(nodes, doors, 0.0)
        for _ in range(8):
            for door in doors:
                draw = door.random.random if two_choices else None
                nodes[door.place(nodes, profiles, 0.0, draw)].take(0.0)
        longest += max(node.queue(0.0) for node in nodes.values())
        idle += sum(not node.queue(0.0) for node in nodes.values())
    return longest / 40, idle / 40


def report(nodes: dict[str, Node], doors: list[Gateway], now: float) -> None:
    for node in nodes.values():
        node.reported = node.queue(now)
    for door in doors:
        door.sent.clear()


@pytest.mark.parametrize("seed", range(3))
def test_four_gateways_do_not_all_send_their_burst_to_the_same_nodes(seed: int) -> None:
    """Everybody's best choice stacks four tasks on eight nodes, and leaves the others idle."""
    longest, idle = bursts(seed, two_choices=False)
    assert (longest, idle) == (4.0, 24.0)
    longest, idle = bursts(seed, two_choices=True)
    assert longest < 3.5
    assert idle < 12.0


@pytest.mark.parametrize(("gateways", "least"), [(4, 0.8), (16, 0.5)])
@pytest.mark.parametrize("seed", range(3))
def test_stale_reports_draw_no_herd(seed: int, gateways: int, least: float) -> None:
    """Under a steady load the longest wait is shorter: the more gateways, the clearer."""
    herd, apart = steady(seed, gateways, False), steady(seed, gateways, True)
    assert max(apart) < least * max(herd)
