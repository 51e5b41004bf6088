# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The operator's configuration: one YAML file, which the chart writes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kubediffusion.api.load import load
from kubediffusion.api.types import Resource

Selector = Annotated[dict[str, str], Field(max_length=16)]


class Peer(Resource):
    """Pods that a NetworkPolicy lets in: by labels, in a namespace (empty: the model's own)."""

    namespace: str = ""
    selector: Selector = Field(default_factory=dict[str, str])


class Gateway(Peer):
    """The gateways' pods, and the address that a workflow's status tells."""

    endpoint: Annotated[
        str,
        Field(description="http://HOST:PORT of the gateway; {namespace} is filled in."),
    ] = ""


class Prometheus(Peer):
    """Where the autoscaler reads, and who may scrape the nodes."""

    url: Annotated[str, Field(description="Empty: nothing is scaled by load.")] = ""
    bearer_token_file: str = ""
    ca_file: str = ""
    timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 3.0
    stale_seconds: Annotated[
        float, Field(gt=0, le=600, description="A sample older than this is unknown.")
    ] = 30.0


class ScalingConfig(Resource):
    """The built-in autoscaler."""

    enabled: bool = True
    interval_seconds: Annotated[float, Field(gt=0, le=300)] = 5.0
    gpu_budget: Annotated[
        int | None, Field(ge=0, description="Of a namespace; its ResourceQuota counts too.")
    ] = None
    gpu_resource: str = "nvidia.com/gpu"


class Weights(Resource):
    """The volume at /cache: without a claim each pod downloads into an emptyDir of its own."""

    claim_name: str = ""
    read_only: bool = False
    size_limit: Annotated[str, Field(description="Of the emptyDir.")] = ""


class SecretKey(Resource):
    name: str
    key: str = "token"


class NetworkPolicies(Resource):
    """A default-deny NetworkPolicy with the few edges needed, for each model and pool."""

    enabled: bool = True
    hugging_face: Annotated[
        bool, Field(description="Nodes that may have hf:// sources reach the hub.")
    ] = True
    # NetworkPolicyPeers: the cluster's DNS (empty: anyone's), and who scrapes beside `prometheus`.
    dns: tuple[dict[str, Any], ...] = ()
    scrapers: tuple[dict[str, Any], ...] = ()
    # Rules as in networking.k8s.io/v1, for a mirror of the hub or a proxy, say.
    extra_egress: tuple[dict[str, Any], ...] = ()
    extra_ingress: tuple[dict[str, Any], ...] = ()


class OperatorConfig(Resource):
    """All that the operator is told at its start."""

    namespace: Annotated[str, Field(description="Empty: all namespaces.")] = ""
    image: Annotated[str, Field(min_length=1, description="Of the model nodes.")]
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    device: str = "cpu"
    # A PodTemplateSpec fragment that every node's pod is merged over.
    node_defaults: dict[str, Any] = Field(default_factory=dict[str, Any])
    weights: Weights = Weights()
    hf_token_secret: SecretKey | None = None
    gateway: Gateway = Gateway()
    operator: Peer = Peer()
    prometheus: Prometheus = Prometheus()
    network_policies: NetworkPolicies = NetworkPolicies()
    scaling: ScalingConfig = ScalingConfig()
    debounce_seconds: Annotated[float, Field(ge=0, le=10)] = 0.1
    health_port: Annotated[int, Field(ge=0, le=65535)] = 8081
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9090
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_json: bool = True


def load_config(text: str | bytes, source: str = "") -> OperatorConfig:
    """Raises InvalidWorkflow (an InvalidInput) that names every problem by path and line."""
    return load(OperatorConfig, text, source)
