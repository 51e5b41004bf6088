# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Where one task runs: the node that would end it first, by measured costs.

The cost of a node is ``queue + transfer + load + run``. Placement is a pure function, so the
simulator and the coordinator run the same one; equal costs go to the node placed on least recently
and then to the lower address, so a replay places alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kubediffusion.scheduling.fleet import NodeState
from kubediffusion.scheduling.profiles import Profiles


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


def place(
    task: PlacementTask, nodes: Sequence[NodeState], profiles: Profiles, now: float
) -> Placement | None:
    """The node to run `task` on, or None while no node can.

    Nodes that drain or whose queue is full are never chosen; those that are suspect or already
    lost this task only when there is no other.
    """
    able = [node for node in nodes if node.takes_work(now) and _able(task, node)]
    sound = [node for node in able if not node.suspect and node.address not in task.failed_on]
    hosts = {node.address: node.host_id for node in nodes} if task.inputs else {}
    best: tuple[tuple[float, int, str], NodeState] | None = None
    for node in sound or able:
        rank = (_cost(task, node, hosts, profiles, now), node.last_placed, node.address)
        if best is None or rank < best[0]:
            best = (rank, node)
    if best is None:
        return None
    (seconds, _, _), node = best
    return Placement(
        address=node.address,
        seconds=seconds,
        run_seconds=_run(task, node, profiles),
        ready=task.model in node.ready and all(helper in node.ready for helper in task.helpers),
        resumes=_resumes(task, node),
    )


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


def _cost(
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
    return node.queue_seconds + transfer + load + _run(task, node, profiles)


def _load(model: str, node: NodeState, profiles: Profiles, now: float) -> float:
    elapsed = max(0.0, now - node.loading[model])
    expected = profiles.load_seconds(model)
    # A load that takes longer than it should is not about to end: it may take as long again.
    return expected - elapsed if elapsed < expected else elapsed
