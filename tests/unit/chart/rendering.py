# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The chart as Helm renders it, for tests to look into."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kubediffusion_operator.config import OperatorConfig, load_config

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts/kubediffusion"
EXAMPLES = sorted((ROOT / "examples/values").glob("*.yaml"))
# Helm built from source believes that every server is 1.20.
KUBERNETES = "1.34.4"

Object = dict[str, Any]

# A release that has everything that can be switched on.
EVERYTHING: Object = {
    "imagePullSecrets": [{"name": "registry"}],
    "nodes": {
        "device": "cuda",
        "gpuBudget": 4,
        "podTemplate": {
            "metadata": {"labels": {"team": "pictures"}},
            "spec": {
                "nodeSelector": {"accelerator": "h100"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
                "priorityClassName": "serving",
            },
        },
    },
    "weights": {"create": True, "storageClassName": "fast"},
    "hfToken": {"secretName": "hugging-face"},
    "operator": {"namespaced": False, "nodeSelector": {"pool": "control"}},
    "gateway": {
        "autoscaling": {"enabled": True},
        "apiKeys": {"keys": ["first-key", "second-key"]},
        "publicUrl": "https://images.example.com",
        "policy": "kubediffusion-fair",
        "jobDatabase": {"secretName": "jobs"},
        "jobResults": {"url": "s3://pictures/jobs"},
        "service": {"type": "LoadBalancer", "sessionAffinity": "ClientIP"},
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "hosts": ["images.example.com"],
            "tls": [{"secretName": "images-tls", "hosts": ["images.example.com"]}],
        },
        "podLabels": {"team": "pictures"},
    },
    "monitors": {"kind": "PodMonitor", "labels": {"release": "prometheus"}},
    "alerts": {"prometheusRule": True},
    "networkPolicy": {"clients": [{"namespaceSelector": {"matchLabels": {"may": "draw"}}}]},
}


class HelmError(Exception):
    """Helm refused; its words."""


@dataclass(frozen=True)
class Helm:
    program: str

    def __call__(self, *arguments: str | Path, stdin: str = "", **environment: str) -> str:
        """Helm's standard output. Raises HelmError."""
        command = [self.program, *(str(part) for part in arguments)]
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=environment or None
        )
        if done.returncode:
            raise HelmError(done.stdout + done.stderr)
        return done.stdout

    def render(
        self, values: Mapping[str, Any] | Path | None = None, *flags: str, release: str = "kd"
    ) -> Rendered:
        """All objects of the release `release` in the namespace ``pictures``, test included."""
        stdin, file = "", values
        if not isinstance(values, Path):
            stdin, file = yaml.safe_dump(dict(values or {})), Path("-")
        text = self(
            "template",
            release,
            CHART,
            *("--namespace", "pictures", "--kube-version", KUBERNETES, "--values", str(file)),
            *flags,
            stdin=stdin,
        )
        return Rendered([each for each in yaml.safe_load_all(text) if each])


@dataclass(frozen=True)
class Rendered:
    objects: Sequence[Object]

    def __iter__(self) -> Iterator[Object]:
        return iter(self.objects)

    def of(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def names(self, kind: str) -> set[str]:
        return {each["metadata"]["name"] for each in self.of(kind)}

    def get(self, kind: str, name: str) -> Object:
        """By its name without the release's: ``gateway``, ``operator``."""
        for each in self.of(kind):
            if each["metadata"]["name"] in (name, f"kd-kubediffusion-{name}"):
                return each
        raise LookupError(f"no {kind} {name}; there are {sorted(self.names(kind))}")

    @property
    def config(self) -> OperatorConfig:
        """The operator's configuration, as the operator reads it."""
        return load_config(self.get("ConfigMap", "operator")["data"]["operator.yaml"])

    def pods(self) -> Iterator[tuple[str, Object, Object]]:
        """(name, metadata, spec) of each pod and pod template."""
        for each in self.objects:
            if each["kind"] == "Pod":
                yield each["metadata"]["name"], each["metadata"], each["spec"]
            elif each["kind"] == "Deployment":
                template = each["spec"]["template"]
                yield each["metadata"]["name"], template["metadata"], template["spec"]


def container(rendered: Rendered, component: str) -> Object:
    """The only container of a Deployment of the chart's."""
    (only,) = rendered.get("Deployment", component)["spec"]["template"]["spec"]["containers"]
    return only


def variables(container: Object) -> dict[str, Any]:
    """Environment variables: their values, or where they come from."""
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}
