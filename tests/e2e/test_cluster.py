# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The cluster that the other end-to-end tests run on is a real one."""

from __future__ import annotations

from tests.cluster.kube import Kube, Object
from tests.e2e.cluster import Cluster, image

# What the restricted level asks of a pod, and of its container.
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def pod(name: str, script: str, template: Object | None = None, **spec: object) -> Object:
    """A pod that runs a Python script in the control plane's image."""
    from_template = (template or {"spec": {"containers": [{}]}})["spec"]
    container = {
        **from_template["containers"][0],
        "name": "main",
        "image": image("control-plane"),
        "imagePullPolicy": "Never",
        "command": ["python", "-c", script],
        "securityContext": CONTAINER_SECURITY,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            **from_template,
            "restartPolicy": "Never",
            "securityContext": POD_SECURITY,
            "terminationGracePeriodSeconds": 1,
            **spec,
            "containers": [container],
        },
    }


def ended(item: Object) -> bool:
    return item["status"].get("phase") in ("Succeeded", "Failed")


def running(item: Object) -> bool:
    return item["status"].get("phase") == "Running"


def test_a_model_node_has_torch_from_the_volume_and_our_code_from_the_image(
    cluster: Cluster, kube: Kube, namespace: str, environment: Object
) -> None:
    script = (
        "import torch, kubediffusion, kubediffusion.models\n"
        "print(torch.ones(2).sum().item(), torch.__file__, kubediffusion.__file__)"
    )
    kube.create(pod("torch", script, environment))
    # Its packages are read from a shared disk the first time.
    done = kube.wait_for("Pod", "torch", ended, timeout=180)
    words = cluster.kubectl("logs", "torch", "-n", namespace)
    assert done["status"]["phase"] == "Succeeded", words
    assert words.split() == [
        "2.0",
        "/opt/environment/torch/__init__.py",
        "/opt/kubediffusion/lib/python3.11/site-packages/kubediffusion/__init__.py",
    ]


def test_a_headless_service_resolves_to_its_pods(
    cluster: Cluster, kube: Kube, namespace: str
) -> None:
    kube.create(pod("server", "import time; time.sleep(600)"))
    spec = {
        "clusterIP": "None",
        "selector": {"app": "server"},
        "ports": [{"name": "grpc", "port": 7070}],
    }
    kube.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": spec})
    address = kube.wait_for("Pod", "server", running, timeout=60)["status"]["podIP"]
    script = f"import socket; print(socket.gethostbyname('s.{namespace}.svc.cluster.local'))"
    kube.wait_all(
        "EndpointSlice",
        lambda slices: slices and slices[0]["endpoints"],
        selector="kubernetes.io/service-name=s",
    )
    kube.create(pod("client", script))
    kube.wait_for("Pod", "client", ended, timeout=60)
    assert cluster.kubectl("logs", "client", "-n", namespace).strip() == address


def test_a_node_joins_takes_pods_and_loses_power(cluster: Cluster, kube: Kube) -> None:
    name = cluster.add_node()
    cluster.set_gpus(name, 1)
    gpu = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    wanted = pod("gpu", "import time; time.sleep(600)")
    wanted["spec"]["containers"][0].update(gpu)
    kube.create(wanted)
    assert kube.wait_for("Pod", "gpu", running, timeout=60)["spec"]["nodeName"] == name
    cluster.remove_node(name)
    kube.wait_gone("Pod", "gpu")
    assert [node["metadata"]["name"] for node in kube.list("Node")] == ["node1"]
