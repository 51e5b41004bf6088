# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""DiffusionModels: which there should be, what a node is told of one, how many replicas it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kubediffusion.api.identity import Arithmetic, canonical_uri, identity
from kubediffusion_operator.planning.cache import PlanCache
from kubediffusion_operator.planning.diff import digest, stamped
from kubediffusion_operator.planning.names import (
    items,
    model_labels,
    name_of,
    owner_reference,
    part,
    uid_of,
)
from kubediffusion_operator.planning.sharing import Conflict, Shared, loras, network, serving
from kubediffusion_operator.planning.types import API_VERSION, Object

DRAIN_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Replicas:
    """`asked` is spec.replicas; `wanted` what there should be. `bound` is what clamped it."""

    asked: int | None
    wanted: int
    bound: str = ""


def wanted_object(model: Shared, cache: PlanCache) -> tuple[Object, list[Conflict]]:
    """The DiffusionModel that serves all of `model`'s uses; and what of them does not count."""
    key = (
        "model",
        model.identity,
        tuple(
            (uid_of(use.workflow), use.role, use.newest, id(use.override), id(use.ref))
            for use in model.uses
        ),
    )
    # The key holds ids, so the value holds the objects: while it is kept, the ids are theirs.
    made, conflicts, _ = cache.get(key, lambda: (*_made(model), list(model.uses)))
    return made, conflicts


def _made(model: Shared) -> tuple[Object, list[Conflict]]:
    how, conflicts = serving(model)
    declared = loras(model)
    spec = network(model.ref) | ({"loras": declared} if declared else {}) | how
    owners = [owner_reference(workflow, controller=False) for workflow in model.workflows]
    wanted: Object = {
        "apiVersion": API_VERSION,
        "kind": "DiffusionModel",
        "metadata": {
            "name": model.identity,
            "labels": model_labels(model.identity),
            "ownerReferences": sorted(owners, key=lambda owner: owner["uid"]),
        },
        "spec": spec,
    }
    return stamped(wanted), conflicts


def identity_of(model: Object, cache: PlanCache) -> str:
    """What the model's name has to be, from its fields. They cannot change."""
    return cache.get(("identity", uid_of(model)), lambda: identity(_arithmetic(model["spec"])))


def _arithmetic(spec: Mapping[str, Any]) -> Arithmetic:
    source = part(spec, "source")
    pruning = part(part(spec, "pruning"), "artifact")
    return Arithmetic(
        family=spec.get("family", ""),
        component=spec.get("component", ""),
        uri=source.get("uri", ""),
        revision=source.get("revision", ""),
        subfolder=source.get("subfolder", ""),
        variant=source.get("variant", ""),
        class_name=spec.get("className", ""),
        dtype=spec.get("dtype", "float32"),
        quantization=spec.get("quantization", ""),
        attention_backend=spec.get("attentionBackend", ""),
        compile=spec.get("compile", "none"),
        tiling=bool(spec.get("tiling")),
        pruning_uri=pruning.get("uri", ""),
        pruning_revision=pruning.get("revision", ""),
        pruning_subfolder=pruning.get("subfolder", ""),
    )


def node_spec(model: Object) -> dict[str, Any]:
    """What a node is told: node.proto's ModelSpec in protobuf's JSON."""
    spec = model["spec"]
    source: Mapping[str, str] = spec["source"]
    content = {
        "identity": name_of(model),
        "family": spec["family"],
        "component": spec["component"],
        "uri": canonical_uri(source["uri"]),
        "revision": source.get("revision", ""),
        "subfolder": source.get("subfolder", ""),
        "variant": source.get("variant", ""),
        "dtype": spec.get("dtype", "float32"),
        "className": spec.get("className", ""),
        "options": _options(spec),
        "loras": [_lora(lora) for lora in items(spec, "loras")],
    }
    return {key: value for key, value in content.items() if value}


def _options(spec: Mapping[str, Any]) -> dict[str, str]:
    """As `workflow.resolve` gives them: only what differs from the usual."""
    pruning = part(part(spec, "pruning"), "artifact")
    compiled = spec.get("compile", "none")
    options = {
        "quantization": spec.get("quantization", ""),
        "attention_backend": spec.get("attentionBackend", ""),
        "compile": "" if compiled == "none" else compiled,
        "tiling": "true" if spec.get("tiling") else "",
        "pruning_uri": pruning.get("uri", ""),
        "pruning_revision": pruning.get("revision", ""),
        "pruning_subfolder": pruning.get("subfolder", ""),
    }
    return {key: value for key, value in options.items() if value}


def _lora(lora: Mapping[str, Any]) -> dict[str, str]:
    source: Mapping[str, str] = lora["source"]
    use = {
        "name": lora["name"],
        "uri": source["uri"],
        "revision": source.get("revision", ""),
        "subfolder": source.get("subfolder", ""),
        "weightName": lora.get("weightName", ""),
    }
    return {key: value for key, value in use.items() if value}


def replicas_of(model: Object) -> Replicas:
    """spec.replicas within scaling's bounds, or the least of them where nobody has said yet.

    Without scaling, and with an external one, the number is whoever's sets it: nothing is clamped.
    """
    spec = model["spec"]
    asked: int | None = spec.get("replicas")
    scaling: Mapping[str, Any] | None = spec.get("scaling")
    if scaling is None:
        return Replicas(asked, 1 if asked is None else asked)
    least = int(scaling.get("minReplicas", 1))
    most = max(least, int(scaling.get("maxReplicas", 1)))
    if asked is None:
        return Replicas(None, least)
    if scaling.get("mode") == "external" or least <= asked <= most:
        return Replicas(asked, asked)
    name = "minReplicas" if asked < least else "maxReplicas"
    return Replicas(asked, min(max(asked, least), most), f"scaling.{name}")


def drain_seconds(model: Object) -> int:
    return int(model["spec"].get("drainSeconds", DRAIN_SECONDS))


def pool_of(model: Object) -> str:
    """The pool it is placed in, or ""."""
    return str(part(model["spec"], "placement").get("pool", ""))


def content_digest(content: Mapping[str, Any]) -> str:
    """Of what nodes are told, without the generation that counts it."""
    return digest({key: value for key, value in content.items() if key != "generation"})
