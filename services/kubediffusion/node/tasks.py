# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A task from its acceptance to its end, and a model that tasks run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from kubediffusion.models.base import (
    Denoiser,
    Denoising,
    Lora,
    Measured,
    Measures,
    Model,
    PortValue,
)
from kubediffusion.node.sharing import Share
from kubediffusion.scheduling.order import Entry, Kind
from kubediffusion.tensors import Scope
from kubediffusion.v1alpha1 import node_pb2

if TYPE_CHECKING:
    from kubediffusion.node.session import Session

# (request, task): one of them is here at a time, at one epoch.
Name = tuple[str, str]


class Progress:
    """Bytes of a download, written by the thread that downloads and read by the loop."""

    def __init__(self) -> None:
        self.done = 0
        self.total = 0

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total


class Stop(Enum):
    """Why a task ends at the next boundary."""

    CANCEL = auto()  # nobody wants it any more
    YIELD = auto()  # its gateway asked for it back, with a checkpoint
    DRAIN = auto()  # the node gives it back, because it is going
    EVICT = auto()  # the node gives it back, because its model is going


@dataclass(eq=False)
class Resident:
    """A planned model. `model` is there while its state is READY or EVICTING."""

    spec: node_pb2.ModelSpec
    status: node_pb2.ModelStatus
    model: Model | None = None
    # The same model, if it is one: asked once, since asking takes as long as a small task.
    denoiser: Denoiser | None = None
    # The same model, if it counts; and what of that the metrics have.
    measured: Measured | None = None
    counted: Measures = field(default_factory=Measures)
    progress: Progress = field(default_factory=Progress)
    attempts: int = 0
    retry_at: float = 0.0
    tasks: set[Task] = field(default_factory=set["Task"])
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def identity(self) -> str:
        return self.spec.identity

    @property
    def ready(self) -> bool:
        return self.status.state == node_pb2.MODEL_STATE_READY

    @property
    def loaded(self) -> Model:
        assert self.model is not None, self.identity
        return self.model

    def hold(self, model: Model | None) -> None:
        self.model = model
        self.denoiser = model if isinstance(model, Denoiser) else None
        self.measured = model if isinstance(model, Measured) else None
        self.counted = Measures()

    def enter(self, task: Task) -> None:
        self.tasks.add(task)
        self.idle.clear()

    def leave(self, task: Task) -> None:
        self.tasks.discard(task)
        if not self.tasks:
            self.idle.set()


@dataclass(eq=False, slots=True)
class Task:
    """What the loop and the device thread know of one task.

    The loop writes everything until it hands the task to the device, and `stop` at any time; from
    then on the part below belongs to the device thread.
    """

    assign: node_pb2.Assign
    session: Session
    resident: Resident
    # By the lease's helpers; None for one that is not here.
    helpers: Sequence[Resident | None]
    sequence: int
    arrival: float
    deadline: float | None
    weight: float
    priority: int
    exact: bool
    # Its LoRAs as the plan declared them when it was taken: a later plan does not concern it.
    loras_declared: Sequence[node_pb2.LoraUse] = ()
    # What to run instead of the model's own stage: a step's part, for another node's lease.
    call: Callable[[], Mapping[str, PortValue]] | None = None
    fetching: asyncio.Task[None] | None = None
    # Tensors that did not come inline, by id, and the LoRAs' files.
    fetched: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    loras: Sequence[Lora] = ()
    fetch_seconds: float = 0.0
    stop: Stop | None = None
    ended: bool = False
    # Steps that the metrics have.
    counted: int = 0

    denoising: Denoising | None = None
    batch_key: object = None
    started: float | None = None
    running: bool = False
    run_seconds: float = 0.0
    warnings: Sequence[str] = ()
    steps_run: int = 0
    # Helpers elsewhere that have not been lost, and whether the lease waits for one: then others
    # have the device, and the lease is still the current one.
    shares: list[Share] = field(default_factory=list[Share])
    waiting: bool = False
    waiting_since: float = 0.0
    # The next step is half done: its own branch is there.
    parted: bool = False
    own_seconds: float = 0.0
    # Latents that its helpers were sent, by id.
    sent: list[str] = field(default_factory=list[str])
    steps_helped: int = 0
    helper_wait_seconds: float = 0.0
    # When its gateway was last told of its progress.
    told: float = -inf

    # Of the assignment, read once: a message makes each text anew whenever it is asked for it.
    key: node_pb2.TaskKey = field(init=False)
    name: Name = field(init=False)
    model: str = field(init=False)
    stage: str = field(init=False)
    tenant: str = field(init=False)
    is_lease: bool = field(init=False)
    scope: Scope = field(init=False)

    def __post_init__(self) -> None:
        assign, key = self.assign, self.assign.key
        self.key = key
        self.name = (key.request_id, key.task)
        self.model, self.stage, self.tenant = assign.model, assign.stage, assign.tenant
        self.is_lease = self.stage == "denoise"
        self.scope = Scope(self.session.gateway_id, self.name[0])

    @property
    def residents(self) -> list[Resident]:
        """The models here that it runs on."""
        return [self.resident, *(each for each in self.helpers if each is not None)]

    @property
    def rests(self) -> bool:
        """There is nothing to do for it: a part of its step is elsewhere, or it is about to be
        stopped, and must not begin because others were first."""
        leaves = self.stop is not None and (self.is_lease or self.stop is Stop.CANCEL)
        return self.waiting or leaves

    @property
    def labels(self) -> tuple[str, str]:
        """Of its metrics."""
        return (self.model, self.stage)

    @property
    def prefix(self) -> str:
        return f"{self.name[1]}/{self.key.epoch}"

    def remaining_seconds(self) -> float:
        """The work that is left: the coordinator's estimate, or what the steps so far took."""
        expected = self.assign.expected_seconds
        if self.denoising is None:
            return expected
        left = self.denoising.total_steps - self.denoising.step
        if self.steps_run:
            return left * self.run_seconds / self.steps_run
        return expected

    def entry(self, share: float) -> Entry:
        return Entry(
            kind=Kind.LEASE if self.is_lease else Kind.ONE_SHOT,
            sequence=self.sequence,
            arrival=self.arrival,
            priority=self.priority,
            deadline=self.deadline,
            expected_remaining_seconds=self.remaining_seconds(),
            share=share,
            batch_key=self.batch_key,
            running=self.running,
        )

    def timing(self) -> node_pb2.Timing:
        started = self.arrival if self.started is None else self.started
        return node_pb2.Timing(
            queue_seconds=max(0.0, started - self.arrival - self.fetch_seconds),
            fetch_seconds=self.fetch_seconds,
            run_seconds=self.run_seconds,
            steps_run=self.steps_run,
            steps_helped=self.steps_helped,
            helper_wait_seconds=self.helper_wait_seconds,
        )
