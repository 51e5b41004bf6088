# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Who says where a task runs: the queues of the nodes, task by task, or a policy (`driver`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from kubediffusion.gateway.attempts import Attempt, TaskRun
from kubediffusion.gateway.connections import NodeConnection
from kubediffusion.gateway.dispatch import placement_task
from kubediffusion.gateway.helpers import Helpers, choose
from kubediffusion.gateway.nodes import Fleet
from kubediffusion.scheduling.placement import Placement
from kubediffusion.v1alpha1 import gateway_pb2

if TYPE_CHECKING:
    from kubediffusion.gateway.coordinator import ImageRun


class Turn:
    """There are nodes for the task, and it is not its turn: `ImageRun.take_turn` says when."""


TURN = Turn()


class Placing(Protocol):
    def place(self, run: ImageRun, task: TaskRun) -> Placement | Turn | None:
        """Where a task runs whose inputs are there; None while no node can take it."""
        ...

    def helpers(self, task: TaskRun, node: NodeConnection) -> Helpers:
        """Who helps a task that is about to be sent to that node."""
        ...

    def touched(self, run: ImageRun) -> None:
        """Something became of a task of it: one awaits its turn, left its node, or all ended."""
        ...

    def ran(self, attempt: Attempt, time: gateway_pb2.StageTime) -> None:
        """What a task took that is done."""
        ...


class PlacingByQueue:
    """The node that would end it first, see `scheduling.placement`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def place(self, run: ImageRun, task: TaskRun) -> Placement | Turn | None:
        return self._fleet.place(placement_task(task, run.tasks))

    def helpers(self, task: TaskRun, node: NodeConnection) -> Helpers:
        return choose(self._fleet, task.planned, node, task.failed_on)

    def touched(self, run: ImageRun) -> None:
        pass

    def ran(self, attempt: Attempt, time: gateway_pb2.StageTime) -> None:
        pass
