# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The three resources as kubectl shows and changes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kubediffusion.api import schema
from tests.cluster.crds.manifests import MODEL, POOL, WORKFLOW, changed
from tests.cluster.kube import ROOT, ControlPlane, Kube
from tests.unit.docs.pages import blocks

EXAMPLES = sorted((ROOT / "examples").glob("**/*.yaml"))
OURS = [e for e in EXAMPLES if "kubediffusion.io" in e.read_text().partition("apiVersion:")[2][:30]]
NAMES = {"dwf": "diffusionworkflows", "dmodel": "diffusionmodels", "mpool": "modelpools"}


@pytest.fixture
def kubectl(control_plane: ControlPlane, crds: list[str], namespace: str) -> Any:
    assert crds

    def call(*words: str, stdin: str = "") -> str:
        return control_plane.kubectl("-n", namespace, *words, stdin=stdin)

    return call


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_examples_are_taken(kubectl: Any, path: Path) -> None:
    said = kubectl("apply", "--dry-run=server", "-f", str(path))
    assert "created (server dry run)" in said


def test_examples_of_the_page_are_taken(kubectl: Any) -> None:
    page = (ROOT / "docs/resources.md").read_text()
    whole = [text for text in blocks(page, "yaml") if text.startswith("apiVersion:")]
    said = kubectl("apply", "--dry-run=server", "-f", "-", stdin="---\n".join(whole))
    assert said.count("created (server dry run)") == len(whole) == len(NAMES)


def test_there_is_an_example_of_each_kind() -> None:
    kinds = {yaml.safe_load(path.read_text())["kind"] for path in OURS}
    assert kinds == {"DiffusionWorkflow", "DiffusionModel", "ModelPool"}


@pytest.mark.parametrize(("short", "plural"), NAMES.items())
def test_short_names_and_the_category(kubectl: Any, short: str, plural: str) -> None:
    assert kubectl("get", short) == kubectl("get", plural)
    for body in (WORKFLOW, MODEL, POOL):
        kubectl("apply", "-f", "-", stdin=yaml.safe_dump(body))
    listed = kubectl("get", "kubediffusion", "-o", "name")
    assert {line.split(".")[0] for line in listed.split()} == {
        "diffusionworkflow",
        "diffusionmodel",
        "modelpool",
    }


def explained(schema_: dict[str, Any], path: str) -> list[str]:
    """Paths of all fields."""
    found = [path]
    for name, child in schema_.get("properties", {}).items():
        found += explained(child, f"{path}.{name}")
    return found


@pytest.mark.parametrize("definition", schema.DEFINITIONS, ids=lambda d: d.kind.__name__)
def test_explain_has_a_word_on_every_field(kubectl: Any, definition: schema.Definition) -> None:
    said = kubectl("explain", definition.plural, "--recursive")
    assert f"KIND:       {definition.kind.__name__}" in said
    fields = kubectl("explain", f"{definition.short}.spec")
    for name, child in schema.structural(definition.kind)["properties"]["spec"][
        "properties"
    ].items():
        assert name in fields
        assert child.get("description"), f"{name} has no description"
        assert " ".join(child["description"].split()[:3]) in " ".join(fields.split())


def test_columns(kubectl: Any, kube: Kube) -> None:
    for body in (WORKFLOW, MODEL, POOL):
        kube.create(body)
    time = "2026-01-01T00:00:00Z"
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "Ready",
        "message": "all is well",
        "lastTransitionTime": time,
    }
    counts = {"replicas": 2, "readyReplicas": 1, "desiredReplicas": 3, "reason": "Starting"}
    for body, status in (
        (WORKFLOW, {"ready": "4/5", "reason": "Starting", "revision": "w-123", "endpoint": "http"}),
        (MODEL, counts),
        (POOL, counts),
    ):
        wanted = {**status, "conditions": [ready]}
        identity = {key: body[key] for key in ("apiVersion", "kind")}
        name = {"name": body["metadata"]["name"]}
        kube.apply({**identity, "metadata": name, "status": wanted}, subresource="status")
    head, row = kubectl("get", "dwf").splitlines()
    assert head.split() == ["NAME", "READY", "REASON", "AGE"]
    assert row.split()[:3] == ["w", "4/5", "Starting"]
    for short in ("dmodel", "mpool"):
        head, row = kubectl("get", short).splitlines()
        assert head.split() == ["NAME", "READY", "REPLICAS", "DESIRED", "REASON", "AGE"]
        assert row.split()[1:5] == ["1", "2", "3", "Starting"]
    wide = kubectl("get", "dwf", "-o", "wide")
    assert all(word in wide for word in ("REVISION", "w-123", "ENDPOINT", "MESSAGE", "all is well"))


@pytest.mark.parametrize(("body", "short"), [(MODEL, "dmodel"), (POOL, "mpool")])
def test_kubectl_scale_and_the_scale_subresource(
    kubectl: Any, kube: Kube, body: dict[str, Any], short: str
) -> None:
    name = body["metadata"]["name"]
    kube.create(body)
    kubectl("scale", short, name, "--replicas=4")
    assert kube.get(body["kind"], name)["spec"]["replicas"] == 4
    status = {"replicas": 3, "selector": "a=b,c=d"}
    known = kube.get(body["kind"], name)
    kube.replace({**known, "status": status}, subresource="status")
    scale = kube.get(body["kind"], name, subresource="scale")
    assert scale["spec"]["replicas"] == 4
    assert scale["status"] == {"replicas": 3, "selector": "a=b,c=d"}


def test_a_model_without_replicas_gets_them_by_its_scale(kubectl: Any, kube: Kube) -> None:
    """As the plan's first word on them does, and a user's may."""
    name = MODEL["metadata"]["name"]
    kube.create(changed(MODEL, {"spec.replicas": None}))
    assert "replicas" not in kube.get("DiffusionModel", name)["spec"]
    kube.patch("DiffusionModel", name, {"spec": {"replicas": 2}}, subresource="scale")
    assert kube.get("DiffusionModel", name)["spec"]["replicas"] == 2


def test_a_status_gets_no_defaults(kube: Kube, crds: list[str]) -> None:
    """What the operator did not say would look as if it had."""
    assert crds
    kube.create(MODEL)
    name = {"name": MODEL["metadata"]["name"]}
    body = {"apiVersion": MODEL["apiVersion"], "kind": MODEL["kind"], "metadata": name}
    after = kube.apply({**body, "status": {"reason": "Starting"}}, subresource="status")
    assert after["status"] == {"reason": "Starting"}


def test_two_managers_keep_their_own_conditions(kube: Kube, crds: list[str]) -> None:
    """The operator's Ready and the autoscaler's MetricsAvailable, by server-side apply."""
    assert crds
    kube.create(MODEL)
    name = {"name": MODEL["metadata"]["name"]}
    body = {"apiVersion": MODEL["apiVersion"], "kind": MODEL["kind"], "metadata": name}

    def said(kind: str) -> dict[str, str]:
        time = "2026-01-01T00:00:00Z"
        return {"type": kind, "status": "True", "reason": "R", "lastTransitionTime": time}

    for manager, kinds in (
        ("operator", ["Ready", "EqualWeights"]),
        ("autoscaler", ["MetricsAvailable"]),
        ("operator", ["Ready"]),
    ):
        status = {"conditions": [said(kind) for kind in kinds]}
        after = kube.apply({**body, "status": status}, manager=manager, subresource="status")
    found = {each["type"] for each in after["status"]["conditions"]}
    assert found == {"Ready", "MetricsAvailable"}
