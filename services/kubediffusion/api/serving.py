# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How a model is served: resources, scaling, placement, pruning. Shared by all three resources."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal as Number
from typing import Annotated, Any, Literal

from pydantic import Field

from kubediffusion.api.types import (
    Decimal,
    Dtype,
    Embedded,
    ObjectName,
    Quantity,
    Resource,
    Rule,
    Seconds,
    Source,
)

Quantities = Annotated[dict[str, Quantity], Field(max_length=16)]
Drain = Annotated[
    Seconds,
    Field(
        description="Time that a node has to end its work when its pod is deleted. A pod's "
        "terminationGracePeriodSeconds is 10 more."
    ),
]
AttentionBackend = Annotated[
    str,
    Field(max_length=32, pattern=r"^[a-z0-9_]*$", description="Attention as diffusers names it."),
]
Compile = Annotated[
    Literal["none", "default", "max-autotune"], Field(description="torch.compile's mode.")
]
Quantization = Annotated[
    str, Field(max_length=32, pattern=r"^[a-z0-9_]*$", description="Of the weights.")
]
Tiling = Annotated[bool, Field(description="Decode in tiles, for little memory.")]

_UNITS: Mapping[str, int | Number] = {
    "": 1,
    "m": Number("0.001"),
    **{letter: 10 ** (3 * n) for n, letter in enumerate("kMGTP", start=1)},
    **{f"{letter}i": 2 ** (10 * n) for n, letter in enumerate("KMGTP", start=1)},
}


def quantity(text: str | int) -> Number:
    """The value of a Kubernetes quantity: ``512Mi`` is 536870912. Raises ValueError."""
    number = str(text).rstrip("mkMGTPiK")
    unit = str(text)[len(number) :]
    if unit not in _UNITS or not number.replace(".", "", 1).isdigit():
        raise ValueError(f"{text!r} is no quantity; write 2, 500m, 512Mi or 8G")
    return Number(number) * _UNITS[unit]


class ResourceClaim(Resource):
    """A dynamic resource claim of the pod, as in core/v1."""

    name: Annotated[ObjectName, Field(description="An entry of the pod's resourceClaims.")]
    request: Annotated[str, Field(max_length=63, description="One request of the claim.")] = ""


def _requests_within_limits(resources: Any) -> bool:
    limits: Mapping[str, str] = resources.limits
    return all(
        name not in limits or quantity(value) <= quantity(limits[name])
        for name, value in resources.requests.items()
    )


def _devices_whole(resources: Any) -> bool:
    limits: Mapping[str, str] = resources.limits
    return all(
        "/" not in name or (name in limits and quantity(limits[name]) == quantity(value))
        for name, value in resources.requests.items()
    )


class Resources(Resource):
    """As core/v1 ResourceRequirements."""

    requests: Annotated[
        Quantities, Field(description='What is kept free for a pod: {cpu: "2", memory: 8Gi}.')
    ] = Field(default_factory=dict)
    limits: Annotated[
        Quantities,
        Field(description='What a pod may take: {"nvidia.com/gpu": "1", memory: 16Gi}.'),
    ] = Field(default_factory=dict)
    claims: Annotated[
        tuple[ResourceClaim, ...],
        Field(max_length=8, description="Dynamic resource claims that the node's container uses."),
    ] = ()

    rules = (
        Rule(
            field="requests",
            cel="!has(self.requests) || !has(self.limits) || self.requests.all(k, "
            "!(k in self.limits) || "
            "quantity(self.requests[k]).compareTo(quantity(self.limits[k])) <= 0)",
            message="a request is above its limit: lower the request, or raise the limit",
            holds=_requests_within_limits,
        ),
        Rule(
            field="limits",
            cel="!has(self.requests) || self.requests.all(k, !k.contains('/') || "
            "(has(self.limits) && k in self.limits && "
            "quantity(self.requests[k]).compareTo(quantity(self.limits[k])) == 0))",
            message="devices such as nvidia.com/gpu cannot be overcommitted: "
            "write them under limits alone",
            holds=_devices_whole,
        ),
    )


class ScalingPolicy(Resource):
    """As autoscaling/v2 HPAScalingPolicy."""

    type: Annotated[
        Literal["Pods", "Percent"], Field(description="Whether value counts pods or percent.")
    ]
    value: Annotated[
        int, Field(ge=1, le=10000, description="The most that may change in the period.")
    ]
    period_seconds: Annotated[int, Field(ge=1, le=1800, description="The period.")]


class ScalingRules(Resource):
    """As autoscaling/v2 HPAScalingRules."""

    stabilization_window_seconds: Annotated[
        int | None,
        Field(
            ge=0,
            le=3600,
            description="The most careful recommendation of so many seconds is taken; "
            "0 for up and 300 for down where left out.",
        ),
    ] = None
    select_policy: Annotated[
        Literal["Max", "Min", "Disabled"],
        Field(description="Which of the policies counts; Disabled: no scaling this way."),
    ] = "Max"
    policies: Annotated[
        tuple[ScalingPolicy, ...], Field(max_length=8, description="Limits to the speed.")
    ] = ()
    tolerance: Annotated[
        Decimal | None,
        Field(description='Deviation from the target that changes nothing; "0.1" where left out.'),
    ] = None


class ScalingBehavior(Resource):
    """As autoscaling/v2 HorizontalPodAutoscalerBehavior."""

    scale_up: Annotated[ScalingRules | None, Field(description="Rules for more replicas.")] = None
    scale_down: Annotated[ScalingRules | None, Field(description="Rules for fewer.")] = None


class Scaling(Resource):
    """How many replicas a model may have. Zero replicas only where minReplicas is 0."""

    mode: Annotated[
        Literal["builtin", "external"],
        Field(
            description="builtin: KubeDiffusion scales by the model's own queue. external: the "
            "scale subresource is yours (HPA, KEDA, kubectl scale); nothing is clamped to "
            "minReplicas and maxReplicas."
        ),
    ] = "builtin"
    min_replicas: Annotated[
        int, Field(ge=0, le=1000, description="0 lets the model go to zero when nobody asks.")
    ] = 1
    max_replicas: Annotated[int, Field(ge=1, le=1000, description="Never more than these.")] = 1
    target_per_replica: Annotated[
        Decimal, Field(description="Requests in the system that one replica is meant to carry.")
    ] = "2"
    behavior: Annotated[
        ScalingBehavior | None, Field(description="How fast, as in autoscaling/v2.")
    ] = None

    rules = (
        Rule(
            field="maxReplicas",
            cel="self.maxReplicas >= self.minReplicas",
            message="maxReplicas is below minReplicas: raise it, or lower minReplicas",
            holds=lambda s: s.max_replicas >= s.min_replicas,
        ),
        Rule(
            field="targetPerReplica",
            cel="double(self.targetPerReplica) > 0.0",
            message='targetPerReplica must be above 0, such as "2"',
            holds=lambda s: float(s.target_per_replica) > 0,
        ),
    )


class Placement(Resource):
    """Where a model's replicas run: a Deployment of its own, or the nodes of a ModelPool."""

    pool: Annotated[ObjectName, Field(description="Name of a ModelPool in the same namespace.")]


# A model in a pool has no pods of its own.
POOLED = Rule(
    field="placement",
    cel="!has(self.placement) || (!has(self.resources) && !has(self.podTemplate))",
    message="a model in a pool has no pods of its own: set resources and podTemplate in the "
    "ModelPool, or remove placement",
    holds=lambda m: m.placement is None or (m.resources is None and m.pod_template is None),
)


class Pruning(Resource):
    """Static-budget token pruning. The artifact changes the model, the budget does not."""

    artifact: Annotated[Source, Field(description="What the trainer wrote; merged at load.")]
    budget: Annotated[
        Decimal,
        Field(
            description="Mean share of tokens kept where a request names none: one of the "
            "artifact's budgets, or 1 for all tokens."
        ),
    ] = "1"
    min_budget: Annotated[
        Decimal | None, Field(description="The least that a request may ask for.")
    ] = None
    max_budget: Annotated[
        Decimal | None, Field(description="The most that a request may ask for.")
    ] = None

    rules = (
        Rule(
            field="budget",
            cel="double(self.budget) > 0.0 && double(self.budget) <= 1.0",
            message='budget is the mean share of tokens kept: above 0 and at most 1, such as "0.6"',
            holds=lambda p: 0 < float(p.budget) <= 1,
        ),
        Rule(
            field="minBudget",
            cel="!has(self.minBudget) || double(self.minBudget) <= double(self.budget)",
            message="minBudget is above budget, where a request names none: raise budget, or "
            "lower minBudget",
            holds=lambda p: p.min_budget is None or float(p.min_budget) <= float(p.budget),
        ),
        Rule(
            field="maxBudget",
            cel="!has(self.maxBudget) || double(self.maxBudget) >= double(self.budget)",
            message="maxBudget is below budget, where a request names none (1, where left out): "
            "lower budget, or raise maxBudget",
            holds=lambda p: p.max_budget is None or float(p.max_budget) >= float(p.budget),
        ),
    )


class ModelOverride(Resource):
    """What a workflow changes about one of its models."""

    enabled: Annotated[
        bool, Field(description="false leaves an optional model out, such as text_encoder_3.")
    ] = True
    source: Annotated[
        Source | None, Field(description="Other weights than the pipeline's own.")
    ] = None
    dtype: Annotated[Dtype | None, Field(description="Other than the pipeline's.")] = None
    attention_backend: AttentionBackend = ""
    compile: Compile = "none"
    quantization: Quantization = ""
    tiling: Tiling = False
    resources: Annotated[
        Resources | None, Field(description="Of a node's container. The oldest workflow's count.")
    ] = None
    scaling: Annotated[
        Scaling | None,
        Field(
            description="How many replicas. Of workflows that share a model the larger minReplicas "
            "and the larger maxReplicas count. Left out: one, or what kubectl scale says."
        ),
    ] = None
    placement: Annotated[
        Placement | None, Field(description="Where it runs. The oldest workflow's counts.")
    ] = None
    pod_template: Annotated[
        Embedded | None,
        Field(
            description="A PodTemplateSpec merged over the pods of this model: containers (the "
            "node's is named node), volumes and env by name. The oldest workflow's counts."
        ),
    ] = None
    drain_seconds: Annotated[
        Seconds | None, Field(description="Time that a node has to end its work; 120.")
    ] = None
    pruning: Annotated[
        Pruning | None, Field(description="Token pruning of a diffusion transformer.")
    ] = None

    rules = (POOLED,)
