# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from follow_rig import GatewayPod, NodePod

from kubediffusion.workflow import ResolvedWorkflow
from tests.cluster.kube import ControlPlane, Kube

StartNode = Callable[..., NodePod]
StartGateway = Callable[..., GatewayPod]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[StartNode]:
    """Starts a node process with the models of a workflow."""
    pods: list[NodePod] = []

    def start(name: str, workflow: ResolvedWorkflow, **options: Any) -> NodePod:
        pods.append(NodePod(tmp_path, name, workflow, **options))
        return pods[-1]

    yield start
    for pod in pods:
        pod.process.kill()
        pod.process.join()


@pytest.fixture
def gateway(
    tmp_path: Path, control_plane: ControlPlane, namespace: str, crds: list[str]
) -> Iterator[StartGateway]:
    """Starts a gateway process that follows the test's namespace."""
    pods: list[GatewayPod] = []

    def start(name: str = "gateway", token: str = "", **variables: str) -> GatewayPod:
        kubeconfig = control_plane.kubeconfig(token, namespace)
        pods.append(GatewayPod(tmp_path, name, kubeconfig, **variables))
        return pods[-1]

    yield start
    for pod in pods:
        pod.kill()
        print(f"---- {pod.name}\n{pod.log.read_text()[-4000:]}")


@pytest.fixture
def kube(kube: Kube, crds: list[str]) -> Kube:
    """As everywhere, with our CRDs served."""
    return kube
