# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Fragments of a PodTemplateSpec laid one over the other, as kubectl's strategic merge does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

# Lists whose items are told apart by a field, and those whose items are taken whole: half a volume
# of one kind and half of another would be none.
_MERGED = {"containers": "name", "initContainers": "name", "ephemeralContainers": "name"}
_REPLACED = {
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "claims": "name",
    "ports": "containerPort",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "schedulingGates": "name",
}
# Lists of which both are meant.
_JOINED = frozenset({"tolerations", "envFrom"})


class BadFragmentError(Exception):
    """A fragment that is no part of a PodTemplateSpec; the text says where."""


def merged(base: Mapping[str, Any], fragment: Mapping[str, Any]) -> dict[str, Any]:
    """`fragment` over `base`, neither changed. A null takes a field out.

    Raises BadFragmentError.
    """
    return _merged(base, fragment, "podTemplate")


def _merged(base: Mapping[str, Any], fragment: Mapping[str, Any], path: str) -> dict[str, Any]:
    result = dict(base)
    for name in fragment:
        value, before = cast(object, fragment[name]), cast(object, base.get(name))
        here = f"{path}.{name}"
        if value is None:
            result.pop(name, None)
        elif name in _MERGED or name in _REPLACED or name in _JOINED:
            result[name] = _lists(name, before, value, here)
        elif _is_map(value) and _is_map(before):
            result[name] = _merged(
                cast("Mapping[str, Any]", before), cast("Mapping[str, Any]", value), here
            )
        elif before is not None and _word(before) != _word(value) and _shaped(before, value):
            raise BadFragmentError(f"{here} is a {_word(before)}, not a {_word(value)}")
        else:
            result[name] = value
    return result


def _lists(name: str, before: object, value: object, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadFragmentError(f"{path} is a list, not a {_word(value)}")
    items = cast("list[Any]", value)
    known = cast("Sequence[Any]", before or ())
    if name in _JOINED:
        return [*known, *(item for item in items if item not in known)]
    key = _MERGED.get(name) or _REPLACED[name]
    for number, item in enumerate(items):
        if not isinstance(item, Mapping) or key not in item:
            raise BadFragmentError(f"{path}[{number}] needs a {key}")
    result: dict[object, Any] = {item[key]: item for item in known}
    for number, item in enumerate(items):
        old = result.get(item[key])
        if old is not None and name in _MERGED:
            result[item[key]] = _merged(old, item, f"{path}[{number}]")
        else:
            result[item[key]] = item
    return list(result.values())


def _is_map(value: object) -> bool:
    return isinstance(value, Mapping)


def _shaped(before: object, value: object) -> bool:
    """One of them is a map or a list; 8080 in place of "http" is none of our business."""
    return isinstance(before, Mapping | list) or isinstance(value, Mapping | list)


def _word(value: object) -> str:
    if isinstance(value, Mapping):
        return "map"
    words = {"list": "list", "str": "text", "bool": "flag", "int": "number", "float": "number"}
    name = type(value).__name__
    return words.get(name, name)
