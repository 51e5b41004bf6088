# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Where one task runs: the node that would end it first, by measured costs.

The cost of a node is ``queue + transfer + load + run``. Placement is a pure function, so the
simulator and the coordinator run the same one; equal costs go to the node placed on least recently
and then to the lower address, so a replay places alike.

Where other gateways place on the same nodes, what is known of a queue is as old as its last report,
and gateways that all took the shortest one would all take the same. There the better of two nodes
drawn at random is taken ("power of two choices"), of those that could be the best at all: a node
that would take longer with an empty queue than another does with its full one is not drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kubediffusion.scheduling.fleet import NodeState
from kubediffusion.scheduling.profiles import Profiles

# What takes so much longer is still as good, where nobody knows the queues of this moment: a little
# nearer to the inputs, or a little faster, must not draw every gateway to one node.
NEARLY = 1.1


@dataclass(frozen=True, slots=True)
class PlacementTask:
    """What placement must know of a task.

    ``inputs`` counts the bytes that would have to be pulled, by the address of the node that holds
    them; ``helpers`` are models that have to be ready on the same node. A task with a checkpoint
    goes on at ``resume_fraction`` of its work on a node whose fingerprint equals
    ``resume_fingerprint``, and starts over on any other.
    """

    model: str
    stage: str
    units: float = 1.0
    helpers: tuple[str, ...] = ()
    inputs: Mapping[str, int] = field(default_factory=dict[str, int])
    failed_on: frozenset[str] = frozenset()
    resume_fingerprint: str = ""
    resume_fraction: float = 1.0


@dataclass(frozen=True, slots=True)
class Placement:
    """The best node. Not ``ready``: it still loads, and waiting for it is the best there is."""

    address: str
    seconds: float
    run_seconds: float
    ready: bool = True
    resumes: bool = False


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A node that can run the task. In the order of `rank` the best is first."""

    node: NodeState
    # What the task takes there when nobody is ahead of it, and with those that are.
    alone: float
    seconds: float

    @property
    def rank(self) -> tuple[float, int, str]:
        return (self.seconds, self.node.last_placed, self.node.address)


def place(
    task: PlacementTask,
    nodes: Sequence[NodeState],
    profiles: Profiles,
    now: float,
    draw: Callable[[], float] | None = None,
) -> Placement | None:
    """The node to run `task` on, or None while no node can.

    Nodes that drain or whose queue is full are never chosen; those that are suspect or already
    lost this task only when there is no other. `draw` gives random numbers from 0 up to 1; they are
    asked for only where several gateways place, and without it the best node is taken there too.
    """
    able = [node for node in nodes if node.takes_work(now) and _able(task, node)]
    sound = [node for node in able if not node.suspect and node.address not in task.failed_on]
    hosts = {node.address: node.host_id for node in nodes} if task.inputs else {}
    candidates: list[_Candidate] = []
    for node in sound or able:
        alone = _alone(task, node, hosts, profiles, now)
        candidates.append(_Candidate(node, alone, node.queue_seconds + alone))
    if not candidates:
        return None
    if draw is not None and any(each.node.gateways > 1 for each in candidates):
        candidates = _two_of(candidates, draw)
    best = min(candidates, key=lambda each: each.rank)
    return Placement(
        address=best.node.address,
        seconds=best.seconds,
        run_seconds=_run(task, best.node, profiles),
        ready=all(model in best.node.ready for model in (task.model, *task.helpers)),
        resumes=_resumes(task, best.node),
    )


def _two_of(candidates: list[_Candidate], draw: Callable[[], float]) -> list[_Candidate]:
    """Two different ones, at random, of those that could be the best."""
    least = min(each.seconds for each in candidates)
    worthy = [each for each in candidates if each.alone <= NEARLY * least]
    if len(worthy) <= 2:
        return worthy
    first = worthy.pop(int(draw() * len(worthy)))
    return [first, worthy[int(draw() * len(worthy))]]


def _able(task: PlacementTask, node: NodeState) -> bool:
    """Has all models, or will have them."""
    return all(
        model in node.ready or model in node.loading for model in (task.model, *task.helpers)
    )


def _resumes(task: PlacementTask, node: NodeState) -> bool:
    return bool(task.resume_fingerprint) and node.fingerprint == task.resume_fingerprint


def _run(task: PlacementTask, node: NodeState, profiles: Profiles) -> float:
    fraction = task.resume_fraction if _resumes(task, node) else 1.0
    return fraction * profiles.run_seconds(task.model, task.stage, node.fingerprint, task.units)


def _alone(
    task: PlacementTask,
    node: NodeState,
    hosts: Mapping[str, str],
    profiles: Profiles,
    now: float,
) -> float:
    transfer = 0.0
    for address, nbytes in task.inputs.items():
        if address != node.address:
            same_host = bool(node.host_id) and hosts.get(address) == node.host_id
            transfer += profiles.transfer_seconds(same_host, nbytes)
    # Models load one after the other.
    load = sum(
        _load(model, node, profiles, now)
        for model in (task.model, *task.helpers)
        if model not in node.ready
    )
    return transfer + load + _run(task, node, profiles)


def _load(model: str, node: NodeState, profiles: Profiles, now: float) -> float:
    elapsed = max(0.0, now - node.loading[model])
    expected = profiles.load_seconds(model)
    # A load that takes longer than it should is not about to end: it may take as long again.
    return expected - elapsed if elapsed < expected else elapsed
