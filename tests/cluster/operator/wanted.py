# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Workflows for tests, and what the cluster has to hold for them."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kubediffusion.api import DiffusionWorkflow
from kubediffusion.resolving import resolve_workflow
from tests.cluster.kube import Kube, Object

API_VERSION = "kubediffusion.io/v1alpha1"
NODES = "app.kubernetes.io/managed-by=kubediffusion,app.kubernetes.io/component=model-node"
CHILDREN = ("ConfigMap", "Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment")
TINY = "builtin://tiny-sd3"
CLASSES = {
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def workflow(name: str, uri: str = TINY, **spec: Any) -> Object:
    pipeline = {"preset": "StableDiffusion3", "source": {"uri": uri}}
    return {
        "apiVersion": API_VERSION,
        "kind": "DiffusionWorkflow",
        "metadata": {"name": name},
        "spec": {"pipeline": pipeline, **copy.deepcopy(spec)},
    }


def pipeline(folder: Path, without: Iterable[str] = ()) -> str:
    """The URI of a pipeline that has an index and no weights: enough to be resolved."""
    folder.mkdir(parents=True, exist_ok=True)
    index = {name: entry for name, entry in CLASSES.items() if name not in set(without)}
    text = json.dumps({"_class_name": "StableDiffusion3Pipeline", **index})
    (folder / "model_index.json").write_text(text)
    return f"file://{folder}"


def models_of(definition: Object) -> dict[str, str]:
    """Identities by role."""
    resolved = resolve_workflow(DiffusionWorkflow.model_validate_json(json.dumps(definition)))
    return {role: ref.identity for role, ref in resolved.models.items()}


def models_of_all(workflows: Iterable[Object]) -> set[str]:
    return {identity for each in workflows for identity in models_of(each).values()}


def present(kube: Kube, kind: str) -> set[str]:
    """Objects of the operator's making that nobody has asked to delete."""
    selector = "" if kind == "DiffusionModel" else NODES
    return {
        found["metadata"]["name"]
        for found in kube.list(kind, selector=selector)
        if not found["metadata"].get("deletionTimestamp")
    }


def differences(kube: Kube, models: set[str]) -> list[str]:
    """What is there and should not be, or the other way round; empty where all is right."""
    found = []
    for kind in ("DiffusionModel", *CHILDREN):
        there = present(kube, kind)
        found += [f"{kind} {name} is missing" for name in sorted(models - there)]
        found += [f"{kind} {name} is too much" for name in sorted(there - models)]
    return found


def wait_for_models(kube: Kube, models: set[str], timeout: float = 60.0) -> None:
    """Until exactly these models and their children are there."""
    end = time.monotonic() + timeout
    while found := differences(kube, models):
        if time.monotonic() > end:
            lines = "\n".join(found)
            raise TimeoutError(f"after {timeout:g} s:\n{lines}")
        time.sleep(0.1)


def versions(kube: Kube) -> dict[tuple[str, str], str]:
    """The resourceVersion of everything that the operator writes."""
    kinds = ("DiffusionWorkflow", "DiffusionModel", "ModelPool", "ControllerRevision", *CHILDREN)
    return {
        (kind, found["metadata"]["name"]): found["metadata"]["resourceVersion"]
        for kind in kinds
        for found in kube.list(kind)
    }


def users_of(model: Mapping[str, Any]) -> set[str]:
    return {owner["name"] for owner in model["metadata"].get("ownerReferences", ())}
