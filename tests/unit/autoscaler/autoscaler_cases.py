# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Objects of a namespace and numbers of a Prometheus, as the autoscaler reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kubediffusion_operator.autoscaler.prometheus import Answer, Sample
from kubediffusion_operator.autoscaler.reading import Reading, reading_of
from kubediffusion_operator.config import OperatorConfig

SPACE = "images"
STALE = 30.0
CONFIG = OperatorConfig(image="node:1")
Object = dict[str, Any]


def answer(*series: tuple[Mapping[str, str], float], warnings: tuple[str, ...] = ()) -> Answer:
    return Answer(tuple(Sample(labels, value) for labels, value in series), warnings)


def answers(
    model: str = "dit",
    *,
    held: float = 0,
    queued: float = 0,
    running: float = 0,
    shed: float | None = 0,
    up: Mapping[str, float] | None = None,
    ages: Mapping[str, float] | None = None,
    workflow_held: float = 0,
    namespace: str = SPACE,
) -> dict[str, Answer]:
    """Two gateways that report one model, unless told otherwise."""
    up = {"g1": 1, "g2": 1} if up is None else up
    ages = {"g1": 1.0, "g2": 2.0} if ages is None else ages
    here = {"namespace": namespace}
    of_model = here | {"model": model}
    parts = {"held": held, "queued": queued, "running": running}
    return {
        "demand": answer(
            *((of_model | {"state": s}, value) for s, value in parts.items()),
            (here | {"workflow": "sd3"}, workflow_held),
        ),
        "ages": answer(*((of_model | {"instance": i}, age) for i, age in ages.items())),
        "shed": answer(*([] if shed is None else [(of_model, shed)])),
        "gateways": answer(*((here | {"instance": i}, value) for i, value in up.items())),
    }


def reading(model: str = "dit", **more: Any) -> Reading:
    return reading_of(answers(model, **more))


def model(
    name: str = "dit",
    *,
    replicas: int | None = 1,
    scaling: Mapping[str, Any] | None = None,
    users: tuple[str, ...] = ("sd3",),
    uid: str = "",
    **spec: Any,
) -> Object:
    """`scaling` of {} is none at all."""
    scaling = {"minReplicas": 0, "maxReplicas": 8} if scaling is None else scaling
    body: Object = {"family": "sd3", "component": "transformer", **spec}
    if scaling:
        body["scaling"] = dict(scaling)
    if replicas is not None:
        body["replicas"] = replicas
    return {
        "apiVersion": "kubediffusion.io/v1alpha1",
        "kind": "DiffusionModel",
        "metadata": {
            "name": name,
            "namespace": SPACE,
            "uid": uid or f"uid-{name}",
            "generation": 1,
        },
        "spec": body,
        "status": {"referencedBy": [{"name": user, "role": name} for user in users]},
    }


def deployment(name: str = "dit", *, gpus: int = 0, conditions: tuple[Object, ...] = ()) -> Object:
    limits = {"nvidia.com/gpu": str(gpus)} if gpus else {"cpu": "1"}
    containers = [{"name": "node", "resources": {"limits": limits}}, {"name": "sidecar"}]
    return {
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": SPACE, "uid": f"uid-{name}-deployment"},
        "spec": {"template": {"spec": {"containers": containers}}},
        "status": {"conditions": list(conditions)},
    }


def pod(
    name: str,
    *,
    of: str = "dit",
    label: str = "model",
    ready: bool = False,
    waiting: str = "",
    crashed: bool = False,
    unschedulable: bool = False,
    going: bool = False,
    phase: str = "Running",
    gpus: int = 0,
) -> Object:
    state: Object = {"waiting": {"reason": waiting}} if waiting else {"running": {}}
    container: Object = {"name": "node", "state": state}
    if crashed:
        container["lastState"] = {"terminated": {"exitCode": 1, "reason": "Error"}}
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    if unschedulable:
        conditions.append(
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no"}
        )
    limits = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    metadata: Object = {"name": name, "namespace": SPACE, "uid": f"uid-{name}"}
    metadata["labels"] = {f"kubediffusion.io/{label}": of}
    metadata["creationTimestamp"] = "2026-01-01T00:00:00Z"
    if going:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"containers": [{"name": "node", "resources": {"limits": limits}}]},
        "status": {"phase": phase, "conditions": conditions, "containerStatuses": [container]},
    }


def named(*objects: Object) -> dict[str, Object]:
    return {each["metadata"]["name"]: each for each in objects}
