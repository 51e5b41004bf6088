# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Whether a second node computes a part of a lease's steps, and how long the lease waits for it.

Guidance runs the denoiser on two prompts at each step. With the negative prompt's half on another
node a step takes half as long, two transfers of latents, and what a message each way costs. That is
worth it only where the other node has nothing to do, and it ends as soon as it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from kubediffusion.scheduling.fleet import NodeState
from kubediffusion.scheduling.placement import PlacementTask
from kubediffusion.scheduling.profiles import Profiles

# Assumed of a message there and its answer, beside the bytes, until divided steps were measured.
ROUND_TRIP_SECONDS = 0.003
# A helper that takes so many times as long as the lease's own half, and at least so long, is given
# up. Its first answer may take longer: constants, allocations, compiled graphs.
PATIENCE = 4.0
LEAST_PATIENCE = 0.25
FIRST_PATIENCE = 5.0
# For one whose part nobody here can compute: the lease would be lost with it.
LONGEST_PATIENCE = 30.0
# The stage under which the wall time of divided steps is kept in profiles, beside "denoise".
DIVIDED = "denoise/divided"


@dataclass(frozen=True, slots=True)
class Division:
    """A denoising that could be divided: `units` of work of `model` in `steps` steps, whose latents
    have `latent_bytes`."""

    model: str
    units: float
    steps: int
    latent_bytes: int


def saving(division: Division, lease: NodeState, helper: NodeState, profiles: Profiles) -> float:
    """Seconds that `helper` would save `lease` in each step; negative where it would cost some.

    By measured times of divided steps where there are some on such a node, else half of a measured
    step less two transfers of the latents. 0 before anything was measured.
    """
    if division.steps < 1:
        return 0.0
    model, units = division.model, division.units
    alone = profiles.measured_run(model, "denoise", lease.fingerprint, units)
    if alone is None:
        return 0.0
    divided = profiles.measured_run(model, DIVIDED, lease.fingerprint, units)
    if divided is not None:
        return (alone - divided) / division.steps
    same_host = bool(lease.host_id) and lease.host_id == helper.host_id
    transfers = 2 * profiles.transfer_seconds(same_host, division.latent_bytes)
    return alone / division.steps / 2 - transfers - ROUND_TRIP_SECONDS


def is_idle(node: NodeState, now: float) -> bool:
    """Nobody runs, waits or is helped there."""
    busy = node.queued or node.running or node.helping or node.queue_seconds > 0
    return not busy and not node.suspect and node.takes_work(now)


def branch_helper(
    division: Division,
    lease: NodeState,
    nodes: Iterable[NodeState],
    profiles: Profiles,
    now: float,
) -> NodeState | None:
    """The idle node with the model that would save most; None where none saves anything."""
    idle = [
        node
        for node in nodes
        if node.address != lease.address and division.model in node.ready and is_idle(node, now)
    ]
    if not idle:
        return None
    gains = {node.address: saving(division, lease, node, profiles) for node in idle}
    best = min(idle, key=lambda node: (-gains[node.address], node.last_placed, node.address))
    return best if gains[best.address] > 0 else None


def control_helper(
    model: str, lease: NodeState, nodes: Iterable[NodeState], *, exact: bool, now: float
) -> NodeState | None:
    """The node that computes the residuals of a ControlNet which `lease` does not host: of an equal
    fingerprint where bits count, on the same machine rather than another, then the least busy."""
    able = [
        node
        for node in nodes
        if node.address != lease.address
        and model in node.ready
        and not node.suspect
        and node.takes_work(now)
        and (not exact or node.fingerprint == lease.fingerprint)
    ]

    def rank(node: NodeState) -> tuple[bool, float, int, str]:
        elsewhere = not lease.host_id or node.host_id != lease.host_id
        return (elsewhere, node.queue_seconds, node.helping, node.address)

    return min(able, key=rank, default=None)


def place_apart(
    task: PlacementTask,
    nodes: Sequence[NodeState],
    fleet: Sequence[NodeState],
    stands_alone: Callable[[str], bool],
    now: float,
) -> tuple[PlacementTask, list[NodeState]]:
    """The task without its helpers, and those of `nodes` where each helper that is not there has an
    equal node of `fleet` to run on. Of several the first decides for all: it has to be there.

    For a task that no node can take with its helpers beside it. Moving residuals costs more than
    anything that is gained by it, so nothing is ever placed apart by choice.
    """
    alone = replace(task, helpers=())

    def able(node: NodeState) -> bool:
        away = [model for model in task.helpers if model not in node.ready]
        if len(task.helpers) > 1 and task.helpers[0] in away:
            return False
        return all(
            stands_alone(model) and control_helper(model, node, fleet, exact=True, now=now)
            for model in away
        )

    return alone, [node for node in nodes if task.model in node.ready and able(node)]


def patience(own_seconds: float, *, answered: bool, required: bool) -> float:
    """How long a lease waits for a part from when it asks, where its own half of a step takes
    `own_seconds`. `required`: nobody here can compute it."""
    if required:
        return LONGEST_PATIENCE
    usual = max(LEAST_PATIENCE, PATIENCE * own_seconds)
    return usual if answered else max(FIRST_PATIENCE, usual)
