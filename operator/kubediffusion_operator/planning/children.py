# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The objects that serve a model or a pool: ConfigMap, Service, NetworkPolicy, PDB, Deployment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from kubediffusion_operator.config import OperatorConfig, Peer
from kubediffusion_operator.planning.diff import stamped
from kubediffusion_operator.planning.names import (
    COMPONENT,
    GRPC_PORT,
    METRICS_PORT,
    NODE,
    items,
    owner_reference,
    part,
    selector,
)
from kubediffusion_operator.planning.pods import pod_template
from kubediffusion_operator.planning.types import Object

RESIDENCY_KEY = "residency.json"
SINCE_KEY = "since"
# A model of many gigabytes may have to be downloaded before its first pod is ready.
PROGRESS_DEADLINE_SECONDS = 1800
REPLICA_SETS_KEPT = 2
NAMESPACE_NAME = "kubernetes.io/metadata.name"
# Every address, which by NetworkPolicies' rules means those outside of the cluster.
OUTSIDE = [{"ipBlock": {"cidr": "0.0.0.0/0"}}, {"ipBlock": {"cidr": "::/0"}}]


@dataclass(frozen=True, slots=True)
class Nodes:
    """What the children of one model or pool are made from.

    `owner` is the DiffusionModel or ModelPool, `name` all its children's. `content` is the plan
    that a model's own nodes begin with, `since` when it became so; `helpers` are the other models
    in it. `downloads`: weights come from the hub.
    """

    owner: Object
    name: str
    labels: Mapping[str, str]
    replicas: int
    drain_seconds: int
    recreate: bool = False
    downloads: bool = True
    memory_limit: int = 0
    content: Mapping[str, Any] | None = None
    since: str = ""
    helpers: Sequence[Object] = ()


def children(nodes: Nodes, config: OperatorConfig) -> list[Object]:
    """In the order in which they are applied. Raises BadFragmentError."""
    made = [_service(nodes), _disruption_budget(nodes), _deployment(nodes, config)]
    if nodes.content is not None:
        made.insert(0, _configmap(nodes, nodes.content))
    if config.network_policies.enabled:
        made.insert(-2, _network_policy(nodes, config))
    return [stamped(each) for each in made]


def content_in(configmap: Object | None) -> dict[str, Any] | None:
    """The plan in a model's ConfigMap, where there is one that can be read."""
    if configmap is None:
        return None
    try:
        content: object = json.loads(configmap["data"][RESIDENCY_KEY])
    except (KeyError, TypeError, ValueError):
        return None
    return cast("dict[str, Any]", content) if isinstance(content, dict) else None


def since_in(configmap: Object | None) -> str:
    """When the plan in a model's ConfigMap became so, where it says that."""
    data: Mapping[str, str] = part(configmap or {}, "data")
    try:
        return datetime.fromisoformat(data.get(SINCE_KEY, "")).isoformat().replace("+00:00", "Z")
    except ValueError:
        return ""


def _object(nodes: Nodes, api_version: str, kind: str, **fields: Any) -> Object:
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": nodes.name,
            "labels": dict(nodes.labels),
            "ownerReferences": [owner_reference(nodes.owner, controller=True)],
        },
        **fields,
    }


def _configmap(nodes: Nodes, content: Mapping[str, Any]) -> Object:
    text = json.dumps(content, indent=1, sort_keys=True)
    data = {RESIDENCY_KEY: text} | ({SINCE_KEY: nodes.since} if nodes.since else {})
    return _object(nodes, "v1", "ConfigMap", data=data)


def _service(nodes: Nodes) -> Object:
    """Headless: gateways dial each node, the ones that are not ready too, and ask it."""
    return _object(
        nodes,
        "v1",
        "Service",
        spec={
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector(nodes.labels),
            "ports": [
                _port("grpc", GRPC_PORT),
                _port("metrics", METRICS_PORT),
            ],
        },
    )


def _port(name: str, port: int) -> dict[str, Any]:
    return {"name": name, "port": port, "targetPort": name, "protocol": "TCP"}


def _disruption_budget(nodes: Nodes) -> Object:
    return _object(
        nodes,
        "policy/v1",
        "PodDisruptionBudget",
        spec={
            "maxUnavailable": 1,
            "selector": {"matchLabels": selector(nodes.labels)},
            # A pod that does not serve anyway must not keep a machine from being drained.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    )


def _deployment(nodes: Nodes, config: OperatorConfig) -> Object:
    template = pod_template(
        config,
        nodes.labels,
        spec=nodes.owner["spec"],
        drain_seconds=nodes.drain_seconds,
        configmap=nodes.name if nodes.content is not None else "",
        memory_limit=nodes.memory_limit,
        helpers=[part(helper["spec"], "resources") for helper in nodes.helpers],
    )
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    return _object(
        nodes,
        "apps/v1",
        "Deployment",
        spec={
            "replicas": nodes.replicas,
            "selector": {"matchLabels": selector(nodes.labels)},
            "strategy": {"type": "Recreate"} if nodes.recreate else rolling,
            "progressDeadlineSeconds": PROGRESS_DEADLINE_SECONDS,
            "revisionHistoryLimit": REPLICA_SETS_KEPT,
            "template": template,
        },
    )


# ---------------------------------------------------------------- the few edges that are needed


def _network_policy(nodes: Nodes, config: OperatorConfig) -> Object:
    given = config.network_policies
    others = {"podSelector": {"matchLabels": {COMPONENT: NODE}}}
    callers = [_peer(config.gateway, "gateway"), _peer(config.operator, "operator"), others]
    ingress: list[dict[str, Any]] = [{"from": callers, "ports": [_tcp(GRPC_PORT)]}]
    if scrapers := _scrapers(config):
        ingress.append({"from": scrapers, "ports": [_tcp(METRICS_PORT)]})
    names: dict[str, Any] = {"to": list(given.dns)} if given.dns else {}
    names["ports"] = [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]
    egress: list[dict[str, Any]] = [names, {"to": [others], "ports": [_tcp(GRPC_PORT)]}]
    if nodes.downloads and given.hugging_face:
        egress.append({"to": OUTSIDE, "ports": [_tcp(443)]})
    return _object(
        nodes,
        "networking.k8s.io/v1",
        "NetworkPolicy",
        spec={
            "podSelector": {"matchLabels": selector(nodes.labels)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [*ingress, *given.extra_ingress],
            "egress": [*egress, *given.extra_egress],
        },
    )


def _scrapers(config: OperatorConfig) -> list[dict[str, Any]]:
    """Who reads metrics. Of a Prometheus that nobody describes: pods of any namespace."""
    scraper, others = config.prometheus, list(config.network_policies.scrapers)
    if scraper.namespace or scraper.selector:
        return [_peer(scraper, ""), *others]
    if scraper.url and not others:
        return [{"namespaceSelector": {}}]
    return others


def _peer(peer: Peer, component: str) -> dict[str, Any]:
    """Pods by label in a namespace; where nothing is configured, the component's in any."""
    if not peer.namespace and not peer.selector:
        return {"namespaceSelector": {}, "podSelector": {"matchLabels": {COMPONENT: component}}}
    result: dict[str, Any] = {}
    if peer.namespace:
        result["namespaceSelector"] = {"matchLabels": {NAMESPACE_NAME: peer.namespace}}
    if peer.selector:
        result["podSelector"] = {"matchLabels": dict(peer.selector)}
    return result


def _tcp(port: int) -> dict[str, Any]:
    return {"port": port, "protocol": "TCP"}


def downloads(model: Object) -> bool:
    """Whether anything of the model comes from the hub."""
    spec: Mapping[str, Any] = model["spec"]
    sources = [spec["source"], part(part(spec, "pruning"), "artifact")]
    sources += [lora["source"] for lora in items(spec, "loras")]
    return any(str(source.get("uri", "")).startswith("hf://") for source in sources)
