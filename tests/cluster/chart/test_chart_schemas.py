# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""kubeconform, strictly, by the schemas that the API server itself publishes.

Its own schemas are on the internet; these are of the version that is tested, and have our CRDs.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.kube import ControlPlane, Kube
from tests.unit.chart.conftest import program
from tests.unit.chart.rendering import EVERYTHING, EXAMPLES, KUBERNETES, ROOT, Helm

# The Prometheus Operator's, without schemas here; test_chart_monitoring looks at them.
FOREIGN = {"PodMonitor", "ServiceMonitor", "PrometheusRule"}
MANIFESTS = [
    *sorted((ROOT / "examples").glob("*.yaml")),
    *(ROOT / "examples/values/manifests").glob("*"),
]


@pytest.fixture(scope="session")
def schemas(
    control_plane: ControlPlane, crds: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a JSON Schema for each kind: GROUP/VERSION/KIND.json."""
    kube = control_plane.kube()
    folder = tmp_path_factory.mktemp("schemas")
    # The list of documents says that it is plain text.
    for root, entry in json.loads(kube.request("GET", "/openapi/v3"))["paths"].items():
        if not root.startswith(("api/", "apis/")):
            continue
        document = kube.request("GET", entry["serverRelativeURL"])
        components = document.get("components", {}).get("schemas", {})
        for name, schema in components.items():
            for kind in schema.get("x-kubernetes-group-version-kind", ()):
                _write(folder, kind, name, components)
    kube.close()
    return folder


def _write(folder: Path, kind: dict[str, str], name: str, components: dict[str, Any]) -> None:
    # As kubeconform names them: of a kind without a group, the version is the group.
    group = kind["group"] or kind["version"]
    path = folder / group / kind["version"] / f"{kind['kind'].lower()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**_strict(components[name]), "components": _all(components)}))


def _all(components: dict[str, Any]) -> dict[str, Any]:
    return {"schemas": {name: _strict(schema) for name, schema in components.items()}}


def _strict(schema: Any) -> Any:
    """OpenAPI's schema as JSON Schema in which nothing unknown is allowed."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _strict(value) for key, value in schema.items()}
    # Kubernetes writes both numbers and words for these.
    if schema.get("format") == "int-or-string" or schema.get("x-kubernetes-int-or-string"):
        return {"type": ["string", "integer"]}
    open_ended = (
        "additionalProperties" in schema or "x-kubernetes-preserve-unknown-fields" in schema
    )
    if isinstance(schema.get("properties"), dict) and "type" in schema and not open_ended:
        result["additionalProperties"] = False
    return result


def conform(schemas: Path, text: str) -> subprocess.CompletedProcess[str]:
    location = (
        f"{schemas}/{{{{ .Group }}}}/{{{{ .ResourceAPIVersion }}}}/{{{{ .ResourceKind }}}}.json"
    )
    flags = ["-strict", "-summary", "-skip", ",".join(FOREIGN), "-kubernetes-version", KUBERNETES]
    command = [program("kubeconform"), *flags, "-schema-location", location]
    return subprocess.run(command, input=text, capture_output=True, text=True)


@pytest.mark.parametrize(
    "values", [{}, EVERYTHING, *EXAMPLES], ids=lambda v: v.stem if isinstance(v, Path) else len(v)
)
def test_what_the_chart_makes_conforms(schemas: Path, helm: Helm, values: Any) -> None:
    rendered = list(helm.render(values))
    done = conform(schemas, yaml.safe_dump_all(rendered))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Errors: 0" in done.stdout
    assert f"Skipped: {sum(each['kind'] in FOREIGN for each in rendered)}" in done.stdout


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda path: path.stem)
def test_examples_conform(schemas: Path, file: Path) -> None:
    done = conform(schemas, file.read_text())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "template", "spec", "containers", 0, "imagePullPolice"), "Never"),
        (("spec", "replicas"), "two"),
        (("spec", "strategi"), {}),
    ],
)
def test_what_does_not_conform_is_found(
    schemas: Path, helm: Helm, path: tuple[str | int, ...], value: Any
) -> None:
    """These schemas can refuse."""
    deployment = helm.render().get("Deployment", "gateway")
    inner: Any = deployment
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert conform(schemas, yaml.safe_dump(deployment)).returncode != 0


def test_a_workflow_with_a_wrong_field_is_found(schemas: Path) -> None:
    workflow = yaml.safe_load((ROOT / "examples/tiny-sd3.yaml").read_text())
    workflow["spec"]["pipelines"] = {}
    assert "pipelines" in conform(schemas, yaml.safe_dump(workflow)).stdout


def test_kubectl_takes_the_manifests(admin: Kube, control_plane: ControlPlane) -> None:
    for file in MANIFESTS:
        control_plane.kubectl("apply", "--dry-run=server", "-f", str(file))
