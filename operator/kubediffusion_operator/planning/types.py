# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What planning reads and what it says. API objects are plain dicts, as the API server sends them.

The driver's part: build an `Observed` from its caches, call `plan`, carry the `Plan` out in this
order: `apply`, `delete`, `scale`, `status`, `events`, `residency`, `resolve`. Every write in it is
wanted: what is there already is not in it, so a settled namespace gives an empty plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from kubediffusion.workflow import PipelineIndex
from kubediffusion_operator.config import OperatorConfig

GROUP = "kubediffusion.io"
API_VERSION = f"{GROUP}/v1alpha1"
MANAGER = "kubediffusion-operator"
# Writes spec.replicas of models; the first time, when it is not there, on the plan's word.
SCALER = "kubediffusion-autoscaler"

Object: TypeAlias = "dict[str, Any]"
# Of one kind in one namespace, by name.
Objects: TypeAlias = Mapping[str, Object]


@dataclass(frozen=True, slots=True)
class Resolution:
    """What the sources of one generation of a workflow said."""

    index: PipelineIndex
    # Of the other sources (`workflow.sources`), by (uri, revision).
    commits: Mapping[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])


@dataclass(frozen=True, slots=True)
class ResolutionError:
    """Why they could not be read. `field` is a path into the workflow.

    The driver sets `due` when it is time to try again; the plan then lists the workflow once more
    and goes on showing this error meanwhile.
    """

    reason: str
    message: str
    field: str = ""
    due: bool = False


ModelState: TypeAlias = Literal[
    "PENDING", "DOWNLOADING", "LOADING", "READY", "FAILED", "EVICTING", "UNSPECIFIED"
]


# Name, uri, revision, subfolder and weight name of a LoRA.
LoraKey: TypeAlias = tuple[str, str, str, str, str]


@dataclass(frozen=True, slots=True)
class ModelReport:
    """node.proto's ModelStatus, as far as planning reads it."""

    identity: str
    state: ModelState
    reason: str = ""
    message: str = ""
    nbytes: int = 0
    digest: str = ""
    # Tasks there that use it; None where the node does not say.
    tasks: int | None = None
    # Some gateway has requests that will still come for it.
    needed: bool = False
    # Of the plan that was answered: what requests may name of this model.
    loras: frozenset[LoraKey] = frozenset()


@dataclass(frozen=True, slots=True)
class ResidencyReport:
    """What one pod answered to the last SetResidency. Kept by the driver under the pod's uid.

    `restarts` is the `ResidencyWrite`'s that was answered. With `error` there was no answer, or
    the node refused; then `generation` is the node's own where it said one, else 0.
    """

    restarts: int
    generation: int
    models: tuple[ModelReport, ...] = ()
    memory_limit: int = 0
    error: str = ""
    # When it was asked, as `Observed.now`. The same answer once more is no news.
    answered: str = field(default="", compare=False)


@dataclass(frozen=True)
class Observed:
    """One namespace. Only objects with the operator's labels among the children and pods."""

    namespace: str
    # RFC 3339, whole seconds, UTC: 2026-01-31T12:00:00Z.
    now: str
    config: OperatorConfig
    workflows: Objects = field(default_factory=dict[str, Object])
    models: Objects = field(default_factory=dict[str, Object])
    pools: Objects = field(default_factory=dict[str, Object])
    revisions: Objects = field(default_factory=dict[str, Object])
    deployments: Objects = field(default_factory=dict[str, Object])
    services: Objects = field(default_factory=dict[str, Object])
    pdbs: Objects = field(default_factory=dict[str, Object])
    networkpolicies: Objects = field(default_factory=dict[str, Object])
    configmaps: Objects = field(default_factory=dict[str, Object])
    pods: Objects = field(default_factory=dict[str, Object])
    # By (uid, generation) of a workflow.
    resolutions: Mapping[tuple[str, int], Resolution | ResolutionError] = field(
        default_factory=dict[tuple[str, int], "Resolution | ResolutionError"]
    )
    # What the API server refused, by (kind, name) of the object that was applied: its words, for as
    # long as the same write would be refused again.
    refused: Mapping[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])
    # By the uid of a pod.
    residency: Mapping[str, ResidencyReport] = field(default_factory=dict[str, ResidencyReport])


@dataclass(frozen=True, slots=True)
class Ref:
    """One object. `uid` is a precondition of its deletion."""

    api_version: str
    kind: str
    name: str
    uid: str = ""


@dataclass(frozen=True, slots=True)
class EventRecord:
    """An event on an object that a user looks at."""

    about: Ref
    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ScaleWrite:
    """A PATCH of a DiffusionModel's scale subresource, by the manager `SCALER`."""

    name: str
    uid: str
    replicas: int


@dataclass(frozen=True, slots=True)
class ResidencyWrite:
    """A SetResidency to one pod; its answer becomes the `ResidencyReport` under `uid`.

    While a pod's models are not all READY or FAILED the plan repeats it, which changes nothing on
    the node, and asks for another round by `requeue_after`.
    """

    pod: str
    uid: str
    restarts: int
    # host:port
    address: str
    # SetResidencyRequest in protobuf's JSON: {"generation", "planner", "models"}.
    content: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PlanningError:
    """An object that planning does not understand, which is a bug of the operator's. `traceback` is
    for its log; the object itself says the rest, in its condition Ready."""

    about: Ref
    message: str
    traceback: str = field(compare=False, default="")


@dataclass
class Plan:
    """What to do, all of it needed. Nothing in it where the namespace is as it should be."""

    # Full objects for server-side apply with `MANAGER` and force, in this order.
    apply: list[Object] = field(default_factory=list[Object])
    delete: list[Ref] = field(default_factory=list[Ref])
    scale: list[ScaleWrite] = field(default_factory=list[ScaleWrite])
    # The whole status that `MANAGER` owns of (kind, name), for server-side apply of the status.
    status: dict[tuple[str, str], Object] = field(default_factory=dict[tuple[str, str], Object])
    events: list[EventRecord] = field(default_factory=list[EventRecord])
    # Workflows whose sources have to be read; the answer goes to `Observed.resolutions`.
    resolve: list[Object] = field(default_factory=list[Object])
    # Written only after `status`: a pool's plan is counted there.
    residency: list[ResidencyWrite] = field(default_factory=list[ResidencyWrite])
    # To be sent once more, though all was carried out: its answer says what tasks are left.
    looks: list[ResidencyWrite] = field(default_factory=list[ResidencyWrite])
    errors: list[PlanningError] = field(default_factory=list[PlanningError])
    # Seconds after which to plan again though nothing happened.
    requeue_after: float | None = None

    @property
    def writes(self) -> int:
        """How many writes to the API server it asks for, events aside."""
        return len(self.apply) + len(self.delete) + len(self.scale) + len(self.status)
