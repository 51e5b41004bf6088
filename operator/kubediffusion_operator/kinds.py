# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The kinds that the operator watches, and which objects of them."""

from __future__ import annotations

from dataclasses import dataclass

from kubediffusion.cluster.api import Kind
from kubediffusion_operator.planning.types import API_VERSION

OURS = "app.kubernetes.io/managed-by=kubediffusion"
NODES = f"{OURS},app.kubernetes.io/component=model-node"
REVISIONS = f"{OURS},kubediffusion.io/workflow"


@dataclass(frozen=True, slots=True)
class Watched:
    """`name` is the field of `planning.Observed`; `selector` the labels of what is of interest."""

    name: str
    kind: str
    collection: Kind
    selector: str = ""


WATCHED = (
    Watched("workflows", "DiffusionWorkflow", Kind(API_VERSION, "diffusionworkflows")),
    Watched("models", "DiffusionModel", Kind(API_VERSION, "diffusionmodels")),
    Watched("pools", "ModelPool", Kind(API_VERSION, "modelpools")),
    Watched("revisions", "ControllerRevision", Kind("apps/v1", "controllerrevisions"), REVISIONS),
    Watched("deployments", "Deployment", Kind("apps/v1", "deployments"), NODES),
    Watched("services", "Service", Kind("v1", "services"), NODES),
    Watched("pdbs", "PodDisruptionBudget", Kind("policy/v1", "poddisruptionbudgets"), NODES),
    Watched(
        "networkpolicies",
        "NetworkPolicy",
        Kind("networking.k8s.io/v1", "networkpolicies"),
        NODES,
    ),
    Watched("configmaps", "ConfigMap", Kind("v1", "configmaps"), NODES),
    Watched("pods", "Pod", Kind("v1", "pods"), NODES),
)
BY_KIND = {each.kind: each for each in WATCHED}
EVENTS = Kind("events.k8s.io/v1", "events")
