# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Where a planned model's family and files come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kubediffusion import artifacts
from kubediffusion.errors import InvalidInput, UnsupportedModel
from kubediffusion.models.base import Family
from kubediffusion.node.tasks import Progress
from kubediffusion.node.weights import Weights, inspect
from kubediffusion.v1alpha1 import node_pb2


class Source(Protocol):
    """Files of a source, on this machine."""

    @property
    def path(self) -> Path: ...


class OpenSource(Protocol):
    """`kubediffusion.sources.open`: blocking; raises SourceUnavailable, NotFound, InvalidInput."""

    def __call__(
        self,
        uri: str,
        revision: str = "",
        subfolder: str = "",
        allow: Sequence[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Source: ...


@dataclass(frozen=True)
class Files:
    """`path` is the component's own folder, `pipeline_path` the one with its tokenizers beside."""

    path: Path
    pipeline_path: Path
    weights: Weights
    # The folder of its pruning artifact.
    pruning_path: Path | None = None


class Library:
    def __init__(self, find_family: Callable[[str], Family], open_source: OpenSource) -> None:
        self._find_family = find_family
        self._open = open_source

    def family(self, spec: node_pb2.ModelSpec) -> Family:
        """Raises UnsupportedModel where this node does not know the family or the component."""
        family = self._find_family(spec.family)
        if spec.component not in family.components:
            raise UnsupportedModel(
                f"family {family.name} has no component {spec.component!r}; it has "
                f"{', '.join(family.components)}",
                field="component",
                reason="UnknownComponent",
            )
        return family

    def fetch(self, spec: node_pb2.ModelSpec, progress: Progress) -> Files:
        """Downloads what this component needs of its pipeline, if it is not here. Blocking."""
        _check_inside(spec.subfolder)
        source = self._open(
            spec.uri, spec.revision, allow=_needed(spec.subfolder, spec.variant), progress=progress
        )
        path = source.path / spec.subfolder if spec.subfolder else source.path
        weights = inspect(path, spec.variant, spec.dtype)
        if not spec.options.get("pruning_uri"):
            return Files(path, source.path, weights)
        artifact = self._fetch_artifact(spec.options)
        return Files(path, source.path, weights.merged(inspect(artifact)), artifact)

    def _fetch_artifact(self, options: Mapping[str, str]) -> Path:
        """The pruning artifact's folder, which holds its two files. Raises UnsupportedModel."""
        uri, subfolder = options["pruning_uri"], options.get("pruning_subfolder", "")
        _check_inside(subfolder)
        own = f"{subfolder}/" if subfolder else ""
        allow = (own + artifacts.MANIFEST, own + artifacts.WEIGHTS)
        source = self._open(uri, options.get("pruning_revision", ""), allow=allow)
        folder = source.path / subfolder if subfolder else source.path
        artifacts.check_files(folder, uri)
        return folder

    def fetch_lora(self, lora: node_pb2.LoraUse) -> Path:
        """The LoRA's file or folder. Blocking."""
        _check_inside(lora.subfolder)
        _check_inside(lora.weight_name)
        name = lora.weight_name or "*.safetensors"
        allow = (f"{lora.subfolder}/{name}" if lora.subfolder else name,)
        source = self._open(lora.uri, lora.revision, allow=allow)
        return source.path / lora.subfolder if lora.subfolder else source.path


def _check_inside(relative: str) -> None:
    if relative.startswith("/") or ".." in relative.split("/"):
        raise InvalidInput(f"{relative!r} leads out of its source", field="subfolder")


def _needed(subfolder: str, variant: str) -> tuple[str, ...]:
    """Of one variant only: repositories hold the same weights in several dtypes side by side."""
    own = f"{subfolder}/" if subfolder else ""
    mark = f".{variant}" if variant else ""
    weights = [
        f"{own}{stem}{mark}{part}.safetensors"
        for stem in ("model", "diffusion_pytorch_model")
        for part in ("", "-*")
    ]
    beside = ("model_index.json", "tokenizer*/*", "scheduler/*", "vae/config.json")
    return (*weights, f"{own}*.json", *beside)
