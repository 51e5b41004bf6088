# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What is known of a model, what it may have, and what it is to have.

Demand is counted in requests in the system; times are seconds of one wall clock, because what a
process knew is told to the next one in wall time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from kubediffusion.scaling.history import ScalingHistory


class MetricState(Enum):
    KNOWN = "Known"
    # A lower bound: somebody who should report does not.
    PARTIAL = "Partial"
    # Nothing can be said, which is not the same as no demand.
    UNKNOWN = "Unknown"


@dataclass(frozen=True, slots=True)
class Metrics:
    """How far the demand can be trusted. `reason` is one CamelCase word, `why` a sentence."""

    state: MetricState = MetricState.KNOWN
    reason: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests in the system, one unit per request and stage.

    ``held`` wait for a model without a replica, ``queued`` for a node to take them, ``running`` are
    with a node. ``shed`` is the rate of refused requests times their run time: what would run now
    had they been taken, so that turning requests away starves nobody of replicas.
    """

    held: float = 0.0
    queued: float = 0.0
    running: float = 0.0
    shed: float = 0.0

    @property
    def total(self) -> float:
        return self.held + self.queued + self.running + self.shed

    def __str__(self) -> str:
        parts = f"held {self.held:g}, queued {self.queued:g}, running {self.running:g}"
        return f"{self.total:.3g} ({parts}, shed {self.shed:.3g})"


@dataclass(frozen=True, slots=True)
class Observation:
    """A model now. `current` replicas are asked for; of those `ready` serve, `starting` are on
    their way and `stuck` cannot start, for `stuck_reason`."""

    current: int
    demand: Demand = field(default_factory=Demand)
    metrics: Metrics = field(default_factory=Metrics)
    ready: int = 0
    starting: int = 0
    stuck: int = 0
    stuck_reason: str = ""

    @property
    def capacity(self) -> int:
        """Replicas that serve or will: one that cannot start is none."""
        return max(0, self.current - self.stuck)


class PolicyType(Enum):
    PODS = "Pods"
    PERCENT = "Percent"


class Select(Enum):
    MAX = "Max"
    MIN = "Min"
    DISABLED = "Disabled"


@dataclass(frozen=True, slots=True)
class Policy:
    """So many replicas, or percent of them, within any `period` seconds."""

    type: PolicyType
    value: int
    period: float


@dataclass(frozen=True, slots=True)
class Rules:
    """One direction of autoscaling/v2's behaviour: `window` seconds to be sure, a `tolerance` as a
    share of the target, and how fast."""

    window: float
    policies: tuple[Policy, ...]
    select: Select = Select.MAX
    tolerance: float = 0.1


UP = Rules(
    window=0.0,
    policies=(Policy(PolicyType.PERCENT, 100, 15.0), Policy(PolicyType.PODS, 4, 15.0)),
)
DOWN = Rules(window=300.0, policies=(Policy(PolicyType.PERCENT, 100, 15.0),))


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model may have. `target`: requests in the system that one replica is meant for."""

    minimum: int = 1
    maximum: int = 1
    target: float = 2.0
    up: Rules = UP
    down: Rules = DOWN


class Reason(Enum):
    """Why a model has the replicas it has; the words of `scalingHistory` and of conditions."""

    # As many as the demand asks for.
    STEADY = "Steady"
    ROSE = "DemandRose"
    FELL = "DemandFell"
    ACTIVATED = "Activated"
    TO_ZERO = "ScaledToZero"
    # The demand asks for others, and for now does not get them.
    STABILIZING = "Stabilizing"
    RATE_LIMITED = "RateLimited"
    AT_MAXIMUM = "AtMaximum"
    AT_MINIMUM = "AtMinimum"
    # Outside its limits, whatever the demand is.
    BELOW_MINIMUM = "BelowMinimum"
    ABOVE_MAXIMUM = "AboveMaximum"
    # More cannot be had, or would not help.
    CANNOT_START = "ReplicasCannotStart"
    BUDGET = "GpuBudgetExhausted"
    BUDGET_SHARED = "GpuBudgetShared"
    WAITING_FOR_GPUS = "WaitingForGpus"
    ACTIVATION_BLOCKED = "ActivationBlocked"
    # Nobody knows.
    METRICS_UNKNOWN = "MetricsUnknown"
    METRICS_PARTIAL = "MetricsPartial"


@dataclass(frozen=True, slots=True)
class Decision:
    """`wanted` is what the demand alone asks for: the recommendation that later decisions
    remember. `message` has the numbers behind `replicas`; `hindrance` says what keeps the model
    from more, without the numbers of the moment."""

    replicas: int
    wanted: int
    reason: Reason
    message: str
    hindrance: str = ""


@dataclass(frozen=True, slots=True)
class ModelCase:
    """A model in its namespace. `gpus` is of one replica; `live` pods are there (or starting),
    `ending` ones still hold their GPUs while they drain."""

    observation: Observation
    limits: Limits
    history: ScalingHistory
    gpus: int = 0
    live: int = 0
    ending: int = 0


@dataclass(frozen=True, slots=True)
class WorkflowCase:
    """`held`: its requests that wait for a model without a replica; None where nobody says."""

    models: frozenset[str]
    held: float | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """GPUs of one namespace; None: no bound.

    ``limit`` is configured; ``quota`` is its ResourceQuota's hard number, of which ``quota_used``
    are taken by whatever runs there. ``reserved`` are taken by pods that are not ours to scale.
    """

    limit: int | None = None
    quota: int | None = None
    quota_used: int = 0
    reserved: int = 0

    @property
    def bound(self) -> int | None:
        """What our models may use together."""
        bounds = [bound for bound in (self.limit, self.quota) if bound is not None]
        return max(0, min(bounds) - self.reserved) if bounds else None
