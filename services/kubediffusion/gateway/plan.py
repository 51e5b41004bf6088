# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a coordinator is asked to do for one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kubediffusion.v1alpha1 import node_pb2

# A ControlNet has no task of its own: it is busy as long as the lease that it helps.
HELPER_STAGE = "control"


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """A task of the workflow, made ready for the wire.

    ``template`` has all that does not change from attempt to attempt, with constant inputs;
    ``ports`` says which output of which task each other input is.
    """

    name: str
    model: str
    stage: str
    template: node_pb2.Assign
    ports: Mapping[str, tuple[str, str]]
    units: float = 1.0
    steps: int = 0
    helpers: tuple[tuple[str, str], ...] = ()  # name and model of each ControlNet
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])  # the caller's, by port

    def field_of(self, port: str) -> str:
        """A port as the caller knows it: ``inputs.prompt``."""
        return f"inputs.{self.inputs[port]}" if port in self.inputs else port

    @property
    def models(self) -> tuple[str, ...]:
        """All that have to be on the node that runs it, its own first."""
        return (self.model, *(model for _, model in self.helpers))


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """The tasks of one image, producers first, and the port that is the image."""

    request_id: str
    index: int
    seed: int
    tasks: Sequence[PlannedTask]
    result: tuple[str, str]
    previews: int = 0
    # On the coordinator's clock; None: as long as it takes.
    deadline: float | None = None
    # The client's own: a picture that comes later is of no use.
    strict: bool = False
    # How long a task may wait for a node that can take it, in seconds.
    activation_timeout: float = 300.0
    # What an earlier coordinator of this image was handed, by task.
    checkpoints: Mapping[str, node_pb2.Checkpoint] = field(
        default_factory=dict[str, node_pb2.Checkpoint]
    )
