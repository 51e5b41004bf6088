# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs, workflows and status as values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from google.protobuf.timestamp_pb2 import Timestamp

from kubediffusion import rpc
from kubediffusion.client.events import Image, image_of
from kubediffusion.tensors import value_of
from kubediffusion.v1alpha1 import gateway_pb2, node_pb2


class JobState(Enum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True)
class Job:
    """A request that outlives its client. `images` come from `get` and `wait` only."""

    id: str
    workflow: str
    state: JobState
    created: datetime | None
    started: datetime | None
    ended: datetime | None
    step: int
    total_steps: int
    images: tuple[Image, ...]
    reason: str
    message: str
    tenant: str


@dataclass(frozen=True)
class Input:
    """One input of a workflow: what it may be, and what it is when it is left out."""

    name: str
    type: str
    required: bool
    default: object
    minimum: float | None
    maximum: float | None
    multiple_of: float | None
    description: str


@dataclass(frozen=True)
class Workflow:
    """`message` says what is missing where the workflow is not `ready`."""

    name: str
    ready: bool
    message: str
    inputs: tuple[Input, ...]
    loras: tuple[str, ...]
    models: tuple[str, ...]
    # Mean keep ratios that a request may ask for, 1 being all tokens, and the one it has where it
    # names none; empty and None of a workflow that prunes nothing.
    budgets: tuple[float, ...] = ()
    budget: float | None = None


@dataclass(frozen=True)
class Model:
    """A model on a node; `state` is pending, downloading, loading, ready, failed or evicting."""

    identity: str
    state: str
    reason: str
    message: str
    nbytes: int
    digest: str
    load_seconds: float
    stages: tuple[str, ...]
    downloaded_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Node:
    id: str
    address: str
    device: str
    version: str
    models: tuple[Model, ...]
    queued: int
    running: int
    memory_used: int
    memory_limit: int
    tensors: int
    tensor_bytes: int
    draining: bool


@dataclass(frozen=True)
class Status:
    gateway_id: str
    nodes: tuple[Node, ...]
    unreachable: tuple[str, ...]
    held: int
    queued: int
    running: int
    uptime_seconds: float


def job_of(job: gateway_pb2.Job) -> Job:
    images = tuple(image_of(image, job.id, index) for index, image in enumerate(job.images))
    return Job(
        id=job.id,
        workflow=job.workflow,
        state=JobState(gateway_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()),
        created=_time(job.created),
        started=_time(job.started),
        ended=_time(job.ended),
        step=job.step,
        total_steps=job.total_steps,
        images=images,
        reason=job.reason,
        message=job.message,
        tenant=job.tenant,
    )


def state_to_wire(state: JobState) -> str:
    return f"JOB_STATE_{state.name}"


def workflow_of(info: gateway_pb2.WorkflowInfo) -> Workflow:
    return Workflow(
        name=info.name,
        ready=info.ready,
        message=info.message,
        inputs=tuple(_input_of(each) for each in info.inputs),
        loras=tuple(info.loras),
        models=tuple(info.models),
        budgets=tuple(info.budgets),
        budget=info.budget if info.HasField("budget") else None,
    )


def _input_of(info: gateway_pb2.InputInfo) -> Input:
    return Input(
        name=info.name,
        type=info.type,
        required=info.required,
        default=value_of(info.default) if info.HasField("default") else None,
        minimum=info.minimum if info.HasField("minimum") else None,
        maximum=info.maximum if info.HasField("maximum") else None,
        multiple_of=info.multiple_of if info.HasField("multiple_of") else None,
        description=info.description,
    )


def status_of(status: gateway_pb2.GetStatusResponse) -> Status:
    return Status(
        gateway_id=status.gateway_id,
        nodes=tuple(_node_of(node) for node in status.nodes),
        unreachable=tuple(status.unreachable),
        held=status.held,
        queued=status.queued,
        running=status.running,
        uptime_seconds=status.uptime_seconds,
    )


def _node_of(node: node_pb2.DescribeResponse) -> Node:
    return Node(
        id=node.node_id,
        address=node.address,
        device=node.device,
        version=node.version,
        models=tuple(_model_of(model) for model in node.models),
        queued=node.load.queued,
        running=node.load.running,
        memory_used=node.load.memory_used,
        memory_limit=node.memory_limit,
        tensors=node.load.tensors,
        tensor_bytes=node.load.tensor_bytes,
        draining=node.load.draining,
    )


def _model_of(model: node_pb2.ModelStatus) -> Model:
    state = rpc.word_of(node_pb2.ModelState, model.state, "MODEL_STATE_").lower()
    return Model(
        identity=model.identity,
        state=state,
        reason=model.reason,
        message=model.message,
        nbytes=model.nbytes,
        digest=model.digest,
        load_seconds=model.load_seconds,
        stages=tuple(model.stages),
        downloaded_bytes=model.downloaded_bytes,
        total_bytes=model.total_bytes,
    )


def _time(stamp: Timestamp) -> datetime | None:
    return stamp.ToDatetime(UTC) if stamp.seconds or stamp.nanos else None
