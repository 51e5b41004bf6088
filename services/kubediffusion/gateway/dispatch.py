# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A task as placement sees it, and as a node is told of it."""

from __future__ import annotations

from collections.abc import Mapping

from kubediffusion.gateway.attempts import TaskRun
from kubediffusion.gateway.helpers import NONE, Helpers
from kubediffusion.gateway.plan import ImagePlan
from kubediffusion.scheduling.placement import Placement, PlacementTask
from kubediffusion.tensors import stored
from kubediffusion.v1alpha1 import node_pb2


def placement_task(task: TaskRun, tasks: Mapping[str, TaskRun]) -> PlacementTask:
    """What placement must know; `tasks` are all of the image, by name."""
    planned, checkpoint = task.planned, task.checkpoint
    resume, left = "", 1.0
    if checkpoint is not None:
        resume = checkpoint.fingerprint
        left -= checkpoint.step / max(checkpoint.total_steps, 1)
    return PlacementTask(
        planned.model,
        planned.stage,
        planned.units,
        planned.models[1:],
        bytes_to_pull(task, tasks),
        task.failed_on,
        resume,
        left,
    )


def bytes_to_pull(task: TaskRun, tasks: Mapping[str, TaskRun]) -> dict[str, int]:
    """What of a task's inputs does not come in its message, by the address that holds it."""
    nbytes: dict[str, int] = {}
    for source, port in task.planned.ports.values():
        if tasks[source].kept_by is not None:
            for ref in stored(tasks[source].outputs[port]):
                nbytes[ref.address] = nbytes.get(ref.address, 0) + ref.nbytes
    return nbytes


def assign_message(
    plan: ImagePlan,
    task: TaskRun,
    tasks: Mapping[str, TaskRun],
    placement: Placement,
    checkpoint_every: int,
    now: float,
    helpers: Helpers = NONE,
) -> node_pb2.WorkRequest:
    """An `assign`: the task's next attempt, with what its producers gave."""
    planned = task.planned
    request = node_pb2.WorkRequest()
    # Filled where it lies: putting it in later would copy the embeddings once more.
    message = request.assign
    message.CopyFrom(planned.template)
    message.key.epoch = task.epoch
    message.expected_seconds = placement.run_seconds
    for port, (source, output) in planned.ports.items():
        message.inputs[port].CopyFrom(tasks[source].outputs[output])
    if plan.deadline is not None:
        left = plan.deadline - now
        message.remaining_ms = max(0, int(left * 1000))
    if planned.stage == "denoise":
        lease = message.lease
        lease.checkpoint_every = checkpoint_every
        if plan.previews and planned.steps:
            lease.preview_every = -(-planned.steps // (plan.previews + 1))
        if task.checkpoint is not None and placement.resumes:
            lease.resume.CopyFrom(task.checkpoint)
        helpers.add_to(lease, planned)
    return request
