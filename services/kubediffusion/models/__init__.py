# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Families of models by name. Their code is imported when a plan first asks for them."""

from __future__ import annotations

from importlib import import_module

from kubediffusion.errors import UnsupportedModel
from kubediffusion.models.base import Family, LoadSpec, Model

_FAMILIES = {
    "sd3": "kubediffusion.models.sd3:SD3",
    "standin": "kubediffusion.models.standin:STANDIN",
}


def family(name: str) -> Family:
    """Raises UnsupportedModel for a family that this version does not know."""
    try:
        module, attribute = _FAMILIES[name].split(":")
    except KeyError:
        raise UnsupportedModel(
            f"no family {name!r}; this version has {', '.join(sorted(_FAMILIES))}",
            field="family",
            reason="UnknownFamily",
        ) from None
    return getattr(import_module(module), attribute)


def load(spec: LoadSpec) -> Model:
    """Raises UnsupportedModel for weights that are not what `spec` says."""
    found = family(spec.family)
    if spec.component not in found.components:
        raise UnsupportedModel(
            f"family {spec.family} has no component {spec.component!r}; it has "
            f"{', '.join(found.components)}",
            field="component",
            reason="UnknownComponent",
        )
    return found.load(spec)
