# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which other nodes compute a part of a lease's steps: a branch of guidance, or a ControlNet.

A helper is given with the lease and never added later. It is left by the lease's node when it is
lost, and ends by itself as soon as others need it; the gateway only has to choose well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kubediffusion.gateway.plan import PlannedTask
from kubediffusion.scheduling.assist import DIVIDED, Division, branch_helper, control_helper
from kubediffusion.scheduling.profiles import Profiles
from kubediffusion.tensors import value_of
from kubediffusion.v1alpha1 import node_pb2

if TYPE_CHECKING:
    from kubediffusion.gateway.connections import NodeConnection
    from kubediffusion.gateway.nodes import Fleet

# Of a divided lease so much must have been helped for its time to be that of divided steps.
MOSTLY = 0.8
# The latents of the families that are served have 16 channels of 4 bytes for 8 x 8 pixels.
LATENT_BYTES_PER_PIXEL = 1.0


@dataclass(frozen=True)
class Helpers:
    """Of one attempt at one lease; `controls` by the ControlNet's name."""

    branch: NodeConnection | None = None
    controls: Mapping[str, NodeConnection] = field(default_factory=dict[str, "NodeConnection"])

    def hold(self) -> None:
        for node in self._nodes():
            node.helping += 1

    def release(self) -> None:
        for node in self._nodes():
            node.helping -= 1

    @property
    def addresses(self) -> frozenset[str]:
        return frozenset(node.address for node in self._nodes())

    def add_to(self, lease: node_pb2.Lease, planned: PlannedTask) -> None:
        for name, model in planned.helpers:
            node = self.controls.get(name)  # without an address: on the lease's own node
            address = "" if node is None else node.address
            kind = node_pb2.Helper.KIND_CONTROLNET
            lease.helpers.add(kind=kind, model=model, name=name, address=address)
        if self.branch is not None:
            kind = node_pb2.Helper.KIND_CFG_BRANCH
            lease.helpers.add(kind=kind, model=planned.model, address=self.branch.address)

    def _nodes(self) -> list[NodeConnection]:
        branch = [] if self.branch is None else [self.branch]
        return [*branch, *self.controls.values()]


NONE = Helpers()


def choose(
    fleet: Fleet, planned: PlannedTask, node: NodeConnection, failed_on: frozenset[str]
) -> Helpers:
    """The helpers of a task that was placed on `node`; none where that is going."""
    if planned.stage != "denoise" or node.leaving:
        return NONE
    lease = node.state
    if lease is None:
        return NONE
    if not planned.helpers:
        division = _division(planned)
        if division is None or fleet.waiting:
            return NONE
        nodes = [n for n in fleet.states_with(planned.model) if n.address not in failed_on]
        helper = branch_helper(division, lease, nodes, fleet.profiles, fleet.now())
        return NONE if helper is None else Helpers(fleet.connections.get(helper.address))
    controls: dict[str, NodeConnection] = {}
    for name, model in planned.helpers:
        if model in lease.ready:
            continue
        nodes = [n for n in fleet.states_with(model) if n.address not in failed_on]
        nodes = nodes or fleet.states_with(model)
        found = control_helper(model, lease, nodes, exact=True, now=fleet.now())
        if found is not None:
            controls[name] = fleet.connections[found.address]
    return Helpers(None, controls)


def _division(planned: PlannedTask) -> Division | None:
    """None for what has no second branch, or must keep it: where bits, tokens or steps count."""
    template = planned.template
    if template.numerics != node_pb2.NUMERICS_FAST:
        return None
    if template.HasField("budget") or template.HasField("step_cache"):
        return None
    guidance = value_of(template.inputs["guidance"]) if "guidance" in template.inputs else 0.0
    if planned.steps < 1 or not isinstance(guidance, int | float) or guidance <= 1:
        return None
    pixels = planned.units / planned.steps
    nbytes = int(pixels * LATENT_BYTES_PER_PIXEL)
    return Division(planned.model, planned.units, planned.steps, nbytes)


def observe(
    profiles: Profiles,
    planned: PlannedTask,
    fingerprint: str,
    units: float,
    timing: node_pb2.Timing,
) -> None:
    """A task's run time; of one with helpers, what its steps took with them."""
    stage, seconds = planned.stage, timing.run_seconds
    if timing.steps_helped:
        if planned.helpers or timing.steps_helped < MOSTLY * timing.steps_run:
            return
        stage, seconds = DIVIDED, seconds + timing.helper_wait_seconds
    profiles.observe_run(planned.model, stage, fingerprint, units, seconds)
