# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The state of one task, and one try at it on one node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Protocol

from kubediffusion.errors import KubeDiffusionError
from kubediffusion.gateway.connections import NodeConnection
from kubediffusion.gateway.helpers import NONE, Helpers
from kubediffusion.gateway.plan import HELPER_STAGE, PlannedTask
from kubediffusion.scheduling.placement import Placement
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2, tensor_pb2

if TYPE_CHECKING:
    from kubediffusion.gateway.coordinator import ImageRun


class AttemptOwner(Protocol):
    @property
    def request_id(self) -> str: ...

    def handle(self, attempt: Attempt, kind: str, body: Any) -> None: ...

    def task_lost(self, attempt: Attempt, reason: str, message: str) -> None: ...


class TaskStatus(Enum):
    """
    WAITING   some producer is not done
    TURN      a policy leads it, and its turn has not come
    HELD      no node can take it now, if there is one; tried again on each change of the fleet
    BACKOFF   lost more than once; tried again after a while
    ASSIGNED  a node has it
    DONE      its outputs are known
    """

    WAITING = auto()
    TURN = auto()
    HELD = auto()
    BACKOFF = auto()
    ASSIGNED = auto()
    DONE = auto()


_STATES = {
    TaskStatus.TURN: "queued",
    TaskStatus.HELD: "queued",
    TaskStatus.ASSIGNED: "running",
    TaskStatus.BACKOFF: "queued",
}


@dataclass(slots=True, eq=False)
class TaskRun:
    planned: PlannedTask
    status: TaskStatus = TaskStatus.WAITING
    epoch: int = 0
    attempts: int = 0
    failures: int = 0
    failed_on: frozenset[str] = frozenset()
    checkpoint: node_pb2.Checkpoint | None = None
    step: int = 0  # of denoising, as last heard
    # Since when nodes that seem to have its model say that they cannot run it.
    refused_since: float | None = None
    attempt: Attempt | None = None
    outputs: Mapping[str, tensor_pb2.Value] = field(default_factory=dict[str, tensor_pb2.Value])
    # The process that keeps outputs which are not inline.
    kept_by: tuple[str, str] | None = None
    time: gateway_pb2.StageTime | None = None

    def states(self, missing: Set[str]) -> Iterator[tuple[str, str, str]]:
        """(model, stage, state) of what is still to do here.

        held      its model is `missing`: no node serves it
        queued    a node does, and has not taken it yet
        running   a node has it

        A request is held for each model without a node, also for those that it will need later. A
        ControlNet counts as the denoiser that it helps, and as held while it has no node itself.
        """
        planned, state = self.planned, _STATES.get(self.status)
        if state is None and self.status is not TaskStatus.WAITING:
            return
        for model, stage in (
            (planned.model, planned.stage),
            *((helper, HELPER_STAGE) for _, helper in planned.helpers),
        ):
            if state != "running" and model in missing:
                yield model, stage, "held"
            elif state is not None:
                yield model, stage, state


class Attempt:
    """A task on a node, at one epoch: what the node's connection hands events to."""

    __slots__ = (
        "epoch",
        "expected_seconds",
        "helpers",
        "leaving",
        "node",
        "request_id",
        "revoked",
        "run",
        "since",
        "started",
        "task",
        "task_name",
    )

    def __init__(
        self,
        run: AttemptOwner,
        task: TaskRun,
        node: NodeConnection,
        placement: Placement,
        since: float,
        helpers: Helpers = NONE,
    ) -> None:
        self.run = run
        self.task = task
        self.node = node
        self.request_id = run.request_id
        self.task_name = task.planned.name
        self.epoch = task.epoch
        self.expected_seconds = placement.run_seconds
        # It was known that the node is going.
        self.leaving = node.leaving
        self.since = since
        # On other nodes; held until the attempt is over.
        self.helpers = helpers
        helpers.hold()
        self.started = False
        # The policy asked for the lease back.
        self.revoked = False

    def handle(self, kind: str, body: Any) -> None:
        if self.task.attempt is self:
            self.run.handle(self, kind, body)

    def lost(self, message: str) -> None:
        if self.task.attempt is self:
            self.run.task_lost(self, "NodeLost", message)


class RunListener(Protocol):
    """Who wants to know what becomes of an image."""

    @property
    def has_begun(self) -> bool:
        """Whether steps were done for any image of its request."""
        ...

    def started(self, run: ImageRun, stage: str, node: str) -> None: ...

    def stepped(self, run: ImageRun, step: int, total_steps: int) -> None: ...

    def previewed(self, run: ImageRun, step: int, image: tensor_pb2.TensorRef) -> None: ...

    def checkpointed(self, run: ImageRun, task: str, checkpoint: node_pb2.Checkpoint) -> None: ...

    def resumed(self, run: ImageRun, task: TaskRun, reason: str) -> None: ...

    def held(self, run: ImageRun, models: Sequence[str]) -> None: ...

    def completed(self, run: ImageRun, image: tensor_pb2.Value) -> None: ...

    def failed(self, run: ImageRun, error: KubeDiffusionError) -> None: ...
