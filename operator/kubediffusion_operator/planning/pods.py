# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The pod of a model node, at the restricted level of Pod Security."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from kubediffusion.api.serving import quantity
from kubediffusion_operator.config import OperatorConfig
from kubediffusion_operator.planning.names import (
    CONTAINER,
    GRPC_PORT,
    HELPERS,
    METRICS_PORT,
    items,
    part,
    selector,
)
from kubediffusion_operator.planning.podtemplate import merged

USER = 65532  # "nonroot" of the images
CACHE = "/cache"
RESIDENCY = "/etc/kubediffusion/residency.json"
# What a model occupies as long as it is there.
ROOM = ("memory", "ephemeral-storage")
# After its drain a node closes its streams and exits.
GRACE_AFTER_DRAIN = 10


def pod_template(
    config: OperatorConfig,
    labels: Mapping[str, str],
    *,
    spec: Mapping[str, Any],
    drain_seconds: int,
    configmap: str = "",
    memory_limit: int = 0,
    helpers: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Ours, under the configuration's node defaults, under the object's own podTemplate.

    `spec` is a ModelSpec or a PoolSpec. With `configmap` the node begins with the plan in it, and
    exits when all of that failed for good; without, it is ready and waits for one. `memory_limit`
    is in bytes. `helpers` are the `resources` of the other models in the plan: their memory is
    added to the node's. Raises BadFragmentError.
    """
    alone = bool(configmap)
    volumes: list[dict[str, Any]] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "cache"} | _weights(config),
    ]
    if alone:
        volumes.append({"name": "residency", "configMap": {"name": configmap}})
    template: dict[str, Any] = {
        "metadata": {"labels": dict(labels)},
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": drain_seconds + GRACE_AFTER_DRAIN,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                # A shared volume full of weights is not walked through at each start.
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "topologySpreadConstraints": [
                {
                    "maxSkew": 1,
                    "topologyKey": "kubernetes.io/hostname",
                    "whenUnsatisfiable": "ScheduleAnyway",
                    "labelSelector": {"matchLabels": selector(labels)},
                }
            ],
            "containers": [
                _container(config, spec, drain_seconds, alone=alone, memory_limit=memory_limit)
            ],
            "volumes": volumes,
        },
    }
    for fragment in (config.node_defaults, spec.get("podTemplate") or {}):
        template = merged(template, fragment)
    _ask_for_device(config, template)
    _make_room(template, helpers)
    # A Deployment finds its pods by these, and the operator its own.
    theirs: Mapping[str, str] = template["metadata"].get("labels") or {}
    template["metadata"]["labels"] = {**theirs, **labels}
    return template


def _container(
    config: OperatorConfig,
    spec: Mapping[str, Any],
    drain_seconds: int,
    *,
    alone: bool,
    memory_limit: int,
) -> dict[str, Any]:
    mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}]
    cache: dict[str, Any] = {"name": "cache", "mountPath": CACHE}
    mounts.append(cache | ({"readOnly": True} if config.weights.read_only else {}))
    if alone:
        folder = RESIDENCY.rpartition("/")[0]
        mounts.append({"name": "residency", "mountPath": folder, "readOnly": True})
    alive = {"grpc": {"port": GRPC_PORT, "service": "liveness"}, "timeoutSeconds": 5}
    # Of a node of its own readiness is the model's. A pool's node serves from the start: each model
    # on it is ready by itself, and the plan needs the node before there is any.
    ready = {"grpc": {"port": GRPC_PORT}, "timeoutSeconds": 5} if alone else alive
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": config.image,
        "imagePullPolicy": config.image_pull_policy,
        "command": ["kubediffusion-node"],
        "env": _env(config, drain_seconds, alone=alone, memory_limit=memory_limit),
        "ports": [
            {"name": "grpc", "containerPort": GRPC_PORT, "protocol": "TCP"},
            {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
        ],
        # The process is up within these 5 minutes; loading may take as long as it takes.
        "startupProbe": {**alive, "periodSeconds": 2, "failureThreshold": 150},
        "livenessProbe": {**alive, "periodSeconds": 10, "failureThreshold": 6},
        "readinessProbe": {**ready, "periodSeconds": 2, "failureThreshold": 3},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    resources = {key: value for key, value in part(spec, "resources").items() if value}
    return container | ({"resources": resources} if resources else {})


def _env(
    config: OperatorConfig, drain_seconds: int, *, alone: bool, memory_limit: int
) -> list[dict[str, Any]]:
    values: dict[str, str] = {
        "KUBEDIFFUSION_ADDRESS": f"0.0.0.0:{GRPC_PORT}",
        "KUBEDIFFUSION_ADVERTISE": f"$(POD_IP):{GRPC_PORT}",
        "KUBEDIFFUSION_METRICS_PORT": str(METRICS_PORT),
        "KUBEDIFFUSION_METRICS_HOST": "0.0.0.0",
        "KUBEDIFFUSION_DRAIN_SECONDS": str(drain_seconds),
        "KUBEDIFFUSION_DEVICE": config.device,
        "KUBEDIFFUSION_LOG_JSON": "true",
        "HF_HOME": f"{CACHE}/huggingface",
        # The root file system is read-only; libraries look for a place of their own.
        "HOME": "/tmp",
    }
    if alone:
        values["KUBEDIFFUSION_RESIDENCY"] = RESIDENCY
        values["KUBEDIFFUSION_EXIT_ON_FAILURE"] = "true"
    if memory_limit:
        values["KUBEDIFFUSION_MEMORY_LIMIT"] = str(memory_limit)
    env: list[dict[str, Any]] = [
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {
            "name": "KUBEDIFFUSION_NODE_ID",
            "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}},
        },
        *({"name": name, "value": value} for name, value in values.items()),
    ]
    if config.hf_token_secret is not None:
        secret = config.hf_token_secret
        # Without the Secret a public model is served all the same.
        key = {"name": secret.name, "key": secret.key, "optional": True}
        env.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": key}})
    return env


def _ask_for_device(config: OperatorConfig, template: Mapping[str, Any]) -> None:
    """A node on an accelerator asks for one, where nobody has said anything of devices."""
    if not config.device.startswith("cuda"):
        return
    for container in template["spec"]["containers"]:
        if container["name"] != CONTAINER:
            continue
        given = part(container, "resources")
        limits = part(given, "limits")
        if not any("/" in name for name in limits) and not items(given, "claims"):
            device = {config.scaling.gpu_resource: "1"}
            container["resources"] = {**given, "limits": {**limits, **device}}


def _weights(config: OperatorConfig) -> dict[str, Any]:
    weights = config.weights
    if weights.claim_name:
        claim: dict[str, Any] = {"claimName": weights.claim_name}
        if weights.read_only:
            claim["readOnly"] = True
        return {"persistentVolumeClaim": claim}
    return {"emptyDir": {"sizeLimit": weights.size_limit} if weights.size_limit else {}}


def room_of(pod_or_template: Mapping[str, Any]) -> str:
    """What a pod has, or is to have, for helpers beside its model's own resources."""
    return str(part(part(pod_or_template, "metadata"), "annotations").get(HELPERS, ""))


def _make_room(template: dict[str, Any], helpers: Sequence[Mapping[str, Any]]) -> None:
    """Adds what helpers occupy. What they compute with, CPUs and accelerator, the denoiser has
    already: they use it in turn. A limit that nobody has set is not set for their sake."""
    node = next(each for each in template["spec"]["containers"] if each["name"] == CONTAINER)
    given = part(node, "resources")
    limits, requests = dict(part(given, "limits")), dict(part(given, "requests"))
    added: list[str] = []
    for name in ROOM:
        most = _sum(name, helpers, ("limits", "requests"))
        least = _sum(name, helpers, ("requests", "limits"))
        if not most + least:
            continue
        # As the API server does: whoever asks for nothing asks for its limit.
        before = requests.get(name, limits.get(name, "0"))
        requests[name] = _in_mebibytes(quantity(str(before)) + least)
        if name in limits:
            limits[name] = _in_mebibytes(quantity(str(limits[name])) + most)
        added.append(f"{name}={_in_mebibytes(least)}/{_in_mebibytes(most)}")
    if added:
        node["resources"] = {**given, "requests": requests} | ({"limits": limits} if limits else {})
        annotations: Mapping[str, str] = template["metadata"].get("annotations") or {}
        template["metadata"]["annotations"] = {**annotations, HELPERS: ",".join(added)}


def _sum(name: str, helpers: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Decimal:
    """Of each helper the first of these that it names."""
    said = [
        next((part(each, kind)[name] for kind in kinds if name in part(each, kind)), 0)
        for each in helpers
    ]
    return sum((quantity(str(each)) for each in said), Decimal())


def _in_mebibytes(nbytes: Decimal) -> str:
    return f"{math.ceil(nbytes / 2**20)}Mi"
