# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The chart on a real cluster, and what its users do: apply, draw, look at what is there."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import openai
import yaml

from tests.cluster.kube import ROOT, Kube, Object, condition, is_true
from tests.e2e.cluster import HUB, Cluster, node_template, variables

EXAMPLE = ROOT / "examples/tiny-sd3.yaml"
CHART = ROOT / "charts/kubediffusion"
VALUES = Path(__file__).parent / "values"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
PROMPT = "a red circle above a blue square"
# Pods on two shared cores, which import torch all at once.
START_TIMEOUT = 240.0
WEIGHTS = "weights"

Values = Mapping[str, Any]


class Release:
    """One release of the chart, in a namespace of its own that enforces the restricted level."""

    def __init__(self, cluster: Cluster, namespace: str, name: str = "kd") -> None:
        self.cluster, self.namespace, self.name = cluster, namespace, name
        self.kube: Kube = cluster.kube.within(namespace)
        # On this machine; /cache of all model nodes, and of the operator.
        self.weights = cluster.folder / "volumes" / namespace / WEIGHTS

    # The administrator

    def install(self) -> float:
        """Seconds until all of the chart was ready."""
        begin = time.monotonic()
        meta = {"name": self.namespace, "labels": RESTRICTED}
        self.cluster.kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
        self.cluster.environment_volume(self.namespace)
        self.cluster.local_volume(self.namespace, WEIGHTS)
        self._helm("install", {})
        return time.monotonic() - begin

    def upgrade(self, values: Values) -> None:
        """To other values, until all of the chart is ready with them."""
        self._helm("upgrade", values)

    def _helm(self, verb: str, values: Values) -> None:
        ours = self.cluster.folder / "values.json"
        node = node_template()
        least = {"cpu": "20m", "memory": "64Mi"}
        node["spec"]["containers"][0]["resources"] = {"requests": least}
        operator = {"extraEnv": variables(HUB)}
        ours.write_text(json.dumps({"nodes": {"podTemplate": node}, "operator": operator}))
        more = self.cluster.folder / "more-values.json"
        more.write_text(json.dumps(values))
        files = [VALUES / "e2e.yaml", ours, more]
        flags = [word for file in files for word in ("-f", str(file))]
        self.helm(verb, self.name, str(CHART), *flags, "--wait", "--timeout", "4m")

    def helm(self, *words: str) -> str:
        return self.cluster.helm(*words, "-n", self.namespace)

    def component(self, name: str) -> str:
        """``gateway``, ``operator`` or ``prometheus``: its Deployment's and Service's name."""
        return f"{self.name}-kubediffusion-{name}"

    def pods(self, component: str) -> list[Object]:
        return self.kube.list("Pod", selector=f"app.kubernetes.io/component={component}")

    def scale(self, component: str, replicas: int, timeout: float = 60.0) -> None:
        """Returns when it has so many, ready."""
        name = self.component(component)
        self.kube.patch("Deployment", name, {"spec": {"replicas": replicas}})

        def done(deployment: Object) -> bool:
            status = deployment.get("status", {})
            current = status.get("observedGeneration") == deployment["metadata"]["generation"]
            return (
                current and status.get("readyReplicas", 0) == status.get("replicas", 0) == replicas
            )

        self.kube.wait_for("Deployment", name, done, timeout=timeout)

    def metric(self, component: str, name: str) -> float:
        """The sum of a metric's samples, of the component's first pod."""
        address = self.pods(component)[0]["status"]["podIP"]
        with urllib.request.urlopen(f"http://{address}:9090/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no {name} in the metrics of {component}"
        return sum(map(float, found))

    # The user

    def kubectl(self, *words: str, stdin: str = "", check: bool = True) -> str:
        return self.cluster.kubectl("-n", self.namespace, *words, stdin=stdin, check=check)

    def plugin(self, *words: str) -> str:
        """``kubectl diffusion ...``"""
        environment = self.cluster.plane.environment(namespace=self.namespace)
        environment["PATH"] += f":{Path(sys.executable).parent}"
        done = subprocess.run(
            ["kubectl", "diffusion", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def apply(self, *objects: Object) -> None:
        self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))

    def serve(self, *objects: Object, timeout: float = START_TIMEOUT) -> list[Object]:
        """Apply workflows and what they need, and wait until they are Ready as they are now."""
        self.apply(*objects)
        names = [
            each["metadata"]["name"] for each in objects if each["kind"] == "DiffusionWorkflow"
        ]
        return [self.ready(name, timeout) for name in names]

    def serve_example(self) -> Object:
        """examples/tiny-sd3.yaml, Ready."""
        self.kubectl("apply", "-f", str(EXAMPLE))
        return self.ready("tiny-sd3")

    def ready(self, name: str, timeout: float = START_TIMEOUT) -> Object:
        """The workflow, once its newest revision is served and all of it is Ready."""

        def served(workflow: Object) -> bool:
            status = workflow.get("status", {})
            newest = status.get("observedGeneration") == workflow["metadata"]["generation"]
            is_served = status.get("revision") == status.get("latestRevision")
            return newest and is_served and is_true("Ready")(workflow)

        return self.kube.wait_for("DiffusionWorkflow", name, served, timeout=timeout)

    def models(self, workflow: str) -> dict[str, str]:
        """By role, the names of the newest revision's DiffusionModels."""
        models = self.kube.get("DiffusionWorkflow", workflow)["status"]["models"]
        return {each["role"]: each["model"] for each in models}

    def history(self, model: str) -> list[Object]:
        """Its scalingHistory, newest first."""
        return self.kube.get("DiffusionModel", model).get("status", {}).get("scalingHistory", [])

    def model_pods(self, model: str) -> list[Object]:
        """Those that are not going."""
        pods = self.kube.list("Pod", selector=f"kubediffusion.io/model={model}")
        return [pod for pod in pods if not pod["metadata"].get("deletionTimestamp")]

    def delete_workflows(self, names: Iterable[str] = (), timeout: float = 180.0) -> None:
        """Delete them (all where none is named) and wait until no model of theirs is left."""
        names = [*names] or [
            each["metadata"]["name"] for each in self.kube.list("DiffusionWorkflow")
        ]
        for name in names:
            self.kube.delete("DiffusionWorkflow", name, missing_ok=True)
        others = [each["metadata"]["name"] for each in self.kube.list("DiffusionWorkflow")]
        if not others:
            self.kube.wait_all("DiffusionModel", lambda left: not left, timeout=timeout)
            nodes = "app.kubernetes.io/component=model-node"
            self.kube.wait_all("Pod", lambda left: not left, selector=nodes, timeout=timeout)

    # The client

    @property
    def url(self) -> str:
        """The gateways' Service, as it is reached from this machine."""
        service = self.kube.get("Service", self.component("gateway"))
        return f"http://{service['spec']['clusterIP']}:8080/v1"

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", timeout=300, max_retries=0)

    def draw(self, workflow: str, seed: int = 7, prompt: str = PROMPT, **fields: Any) -> bytes:
        """A PNG, by the official client."""
        body = {"seed": seed, **fields}
        answer = self.client.images.generate(model=workflow, prompt=prompt, extra_body=body)
        assert answer.data
        assert answer.data[0].b64_json
        return base64.b64decode(answer.data[0].b64_json)


def tiny(name: str = "tiny", models: Mapping[str, Any] | None = None, **spec: Any) -> Object:
    """A workflow on the pipeline that comes with KubeDiffusion: five models, few steps."""
    inputs = {
        "steps": {"default": 8, "maximum": 200},
        "width": {"default": 128},
        "height": {"default": 128},
        "max_sequence_length": {"default": 32},
    }
    return {
        "apiVersion": "kubediffusion.io/v1alpha1",
        "kind": "DiffusionWorkflow",
        "metadata": {"name": name},
        "spec": {
            "pipeline": {"preset": "StableDiffusion3", "source": {"uri": "builtin://tiny-sd3"}},
            "inputs": inputs,
            "models": dict(models or {}),
            **spec,
        },
    }


def is_ready(pod: Object) -> bool:
    return condition(pod, "Ready").get("status") == "True"
