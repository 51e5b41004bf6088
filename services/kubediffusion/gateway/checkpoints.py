# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that outlive the coordinator which was handed them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol

from kubediffusion.gateway.plan import ImagePlan
from kubediffusion.v1alpha1 import node_pb2


class Checkpoints(Protocol):
    """Where a request's checkpoints are kept, by image and task."""

    def found(self, index: int, plan: bytes) -> Mapping[str, node_pb2.Checkpoint]:
        """The last checkpoint of each task of image `index`, of an equal plan (`plan_digest`)."""
        ...

    def keep(self, index: int, plan: bytes, task: str, checkpoint: node_pb2.Checkpoint) -> None:
        """In place of the one before."""
        ...


def plan_digest(plan: ImagePlan) -> bytes:
    """Equal for plans that make the same image by the same models: a checkpoint of one is good
    for the other. A workflow may have changed between two runs of a request."""
    digest = hashlib.sha256()
    for task in plan.tasks:
        template = node_pb2.Assign()
        template.CopyFrom(task.template)
        template.key.request_id = ""
        for name in ("traceparent", "tenant", "weight", "priority"):
            template.ClearField(name)
        text = template.SerializeToString(deterministic=True)
        for part in (text, repr((sorted(task.ports.items()), task.helpers)).encode()):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.digest()
