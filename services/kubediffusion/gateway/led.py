# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""An image that a policy leads: what is done of it, and what it runs as part of which work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kubediffusion.gateway.attempts import TaskRun, TaskStatus
from kubediffusion.gateway.plan import PlannedTask
from kubediffusion.scheduling.pipelines import Job
from kubediffusion.scheduling.policy import Work
from kubediffusion.scheduling.translation import Image, Lead, Part, Stage, parts_of

if TYPE_CHECKING:
    from kubediffusion.gateway.coordinator import ImageRun
    from kubediffusion.v1alpha1 import node_pb2


class Led:
    """``job`` is how the policy knows it, None while it does not; ``lead`` is its pipeline there,
    and ``work`` what it runs. `image` is None where nothing of it can be led."""

    __slots__ = (
        "address",
        "believed",
        "covers",
        "failed_before",
        "image",
        "job",
        "late",
        "lead",
        "not_before",
        "parts",
        "revoked",
        "run",
        "since",
        "soft",
        "work",
    )

    def __init__(self, run: ImageRun, since: float) -> None:
        self.run = run
        self.since = since
        tasks = [task.planned for task in run.tasks.values()]
        self.parts = parts_of(
            [
                (each.name, each.stage, {source for source, _ in each.ports.values()})
                for each in tasks
            ]
        )
        self.image = _image(tasks, self.parts)
        self.lead: Lead | None = None
        self.job: Job | None = None
        self.work: Work | None = None
        # The node of the work, and its parts.
        self.address = ""
        self.covers: frozenset[Part] = frozenset()
        self.revoked = False
        # Where it had failed when the work began: the work's node among them is a last resort.
        self.failed_before = frozenset[str]()
        # What the policy thinks: encoded or not, and the steps that are left.
        self.believed = (False, 0)
        # Its deadline is none that anybody was promised; or it is past, and it is wanted still.
        self.soft = False
        self.late = False
        # Shed, and not to come again before.
        self.not_before = 0.0

    def _tasks(self, *parts: Part) -> list[TaskRun]:
        return [task for name, task in self.run.tasks.items() if self.parts[name] in parts]

    @property
    def failed_on(self) -> frozenset[str]:
        """Where something failed that is still to be done."""
        left = (t.failed_on for t in self.run.tasks.values() if t.status is not TaskStatus.DONE)
        return frozenset[str]().union(*left)

    @property
    def checkpoint(self) -> node_pb2.Checkpoint | None:
        """Of the lease, while that is to be done."""
        (lease,) = self._tasks(Part.STEP)
        return None if lease.status is TaskStatus.DONE else lease.checkpoint

    @property
    def waiting(self) -> frozenset[Part]:
        """The parts that await their turn."""
        return frozenset(
            self.parts[name]
            for name, task in self.run.tasks.items()
            if task.status is TaskStatus.TURN
        )

    @property
    def on_node(self) -> bool:
        """Whether some task of the work is on its node."""
        return any(
            task.attempt is not None and task.attempt.node.address == self.address
            for task in self._tasks(*self.covers)
        )

    @property
    def begun(self) -> bool:
        tasks = self._tasks(*Part)
        return any(t.status is TaskStatus.DONE or t.checkpoint is not None for t in tasks)

    def truth(self) -> tuple[bool, int]:
        """Whether what is led of the encoding is done, and the steps that are left."""
        (lease,) = self._tasks(Part.STEP)
        if lease.status is TaskStatus.DONE:
            return True, 0
        led = self.lead is not None and Part.ENCODE in self.lead.parts
        encoded = not led or all(t.status is TaskStatus.DONE for t in self._tasks(Part.ENCODE))
        done = 0 if lease.checkpoint is None else lease.checkpoint.step
        # At its last step, a lease still has to be finished on a node.
        return encoded, max(1, lease.planned.steps - done)

    def begin(self, work: Work, address: str) -> None:
        assert self.lead is not None, "the policy knows it"
        self.work = work
        self.address = address
        self.failed_before = self.failed_on
        self.revoked = False
        self.covers = frozenset(self.lead.part_of(call.model) for call in work.calls)

    def revoke(self) -> None:
        """Nothing more of the work is sent; a lease on its node comes back at the next step."""
        self.revoked = True
        for task in self._tasks(Part.STEP):
            if task.attempt is not None:
                task.attempt.revoked = True
                task.attempt.node.yield_lease(task.attempt)

    def done_of(self, work: Work) -> list[int]:
        """How often each call of it was done; the policy believes what follows from that."""
        assert self.lead is not None, "the policy knows it"
        encoded, left = self.truth()
        was_encoded, were_left = self.believed
        done: list[int] = []
        for call in work.calls:
            part = self.lead.part_of(call.model)
            if part is Part.ENCODE:
                done.append(int(encoded))
                was_encoded = was_encoded or encoded
            elif part is Part.STEP:
                done.append(min(call.count, max(0, were_left - left)))
                were_left -= done[-1]
            else:
                tasks = self._tasks(Part.DECODE) if part in self.lead.parts else ()
                through = left == 0 and all(task.status is TaskStatus.DONE for task in tasks)
                done.append(int(through))
        self.believed = (was_encoded, were_left)
        return done


def _image(tasks: list[PlannedTask], parts: dict[str, Part]) -> Image | None:
    """None where there is no denoiser, whose lease could be led."""
    stages: dict[Part, list[Stage]] = {part: [] for part in Part}
    for each in tasks if parts else ():
        part = parts[each.name]
        # An earlier denoiser is encoding to the policy: it is not asked for step by step.
        steps = each.steps if part is Part.STEP else 0
        stages[part].append(Stage(each.model, each.stage, each.units, steps, each.models[1:]))
    if len(stages[Part.STEP]) != 1 or stages[Part.STEP][0].steps < 1:
        return None
    (step,) = stages[Part.STEP]
    workflow = tasks[0].template.workflow
    return Image(workflow, tuple(stages[Part.ENCODE]), step, tuple(stages[Part.DECODE]))
