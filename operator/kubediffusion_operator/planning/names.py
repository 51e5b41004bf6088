# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Names and labels of what the operator makes, and small readings of API objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kubediffusion_operator.planning.types import API_VERSION, GROUP, Object, Ref

MANAGED_BY = "app.kubernetes.io/managed-by"
COMPONENT = "app.kubernetes.io/component"
MODEL = f"{GROUP}/model"
POOL = f"{GROUP}/pool"
WORKFLOW = f"{GROUP}/workflow"
APPLIED = f"{GROUP}/applied"
# Of a pod: what was added to its resources for ControlNets.
HELPERS = f"{GROUP}/helpers"

OURS = "kubediffusion"
NODE = "model-node"
CONTAINER = "node"
PLANNER = "operator"
GRPC_PORT = 7070
METRICS_PORT = 9090


def model_labels(name: str) -> dict[str, str]:
    return {MANAGED_BY: OURS, COMPONENT: NODE, MODEL: name}


def pool_labels(name: str) -> dict[str, str]:
    return {MANAGED_BY: OURS, COMPONENT: NODE, POOL: name}


def pool_child(name: str) -> str:
    return f"pool-{name}"


def selector(labels: Mapping[str, str]) -> dict[str, str]:
    """What pods are selected by: nothing in it ever changes."""
    return {key: value for key, value in labels.items() if key in (COMPONENT, MODEL, POOL)}


def selector_text(labels: Mapping[str, str]) -> str:
    """As `kubectl get pods -l` takes it."""
    return ",".join(f"{key}={value}" for key, value in sorted(selector(labels).items()))


def part(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A map inside an object, empty where it is not there."""
    inner: Mapping[str, Any] | None = found.get(key)
    return inner if inner else {}


def items(found: Mapping[str, Any], key: str) -> Sequence[Any]:
    """A list inside an object, empty where it is not there."""
    inner: Sequence[Any] | None = found.get(key)
    return inner if inner else ()


def name_of(found: Object) -> str:
    return str(found["metadata"]["name"])


def uid_of(found: Object) -> str:
    return str(found["metadata"].get("uid") or "")


def generation_of(found: Object) -> int:
    return int(found["metadata"].get("generation") or 0)


def labels_of(found: Object) -> Mapping[str, str]:
    return part(found["metadata"], "labels")


def status_of(found: Object) -> Mapping[str, Any]:
    return part(found, "status")


def is_going(found: Object) -> bool:
    """It is being deleted."""
    return bool(found["metadata"].get("deletionTimestamp"))


def is_ours(found: Object) -> bool:
    """The operator made it, and may delete it."""
    return labels_of(found).get(MANAGED_BY) == OURS


def owners_of(found: Object) -> Iterable[Mapping[str, Any]]:
    return items(found["metadata"], "ownerReferences")


def controller_of(found: Object) -> str:
    """The uid of its controller, or ""."""
    return next((str(o["uid"]) for o in owners_of(found) if o.get("controller")), "")


def age_key(found: Object) -> tuple[str, str]:
    """Sorts by age, the oldest first."""
    return str(found["metadata"].get("creationTimestamp") or "~"), name_of(found)


def owner_reference(owner: Object, *, controller: bool) -> dict[str, Any]:
    reference: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": owner["kind"],
        "name": name_of(owner),
        "uid": uid_of(owner),
    }
    if controller:
        reference |= {"controller": True, "blockOwnerDeletion": False}
    return reference


def ref_of(found: Object) -> Ref:
    return Ref(found["apiVersion"], found["kind"], name_of(found), uid_of(found))
