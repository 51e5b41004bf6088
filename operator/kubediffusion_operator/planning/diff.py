# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Whether an object has to be written.

What we say of an object has to be in it; what others say in addition (the API server's defaults,
a sidecar injector, an annotation of kubectl's) is theirs. What we do not say any more is found by
the hash of what we last applied, which the object carries; server-side apply then takes it out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from kubediffusion.api.serving import quantity
from kubediffusion_operator.planning.names import APPLIED
from kubediffusion_operator.planning.types import Object

# By which fields Kubernetes tells the items of a list apart, the most telling first.
_KEYS = (
    ("uid",),
    ("containerPort", "protocol"),
    ("mountPath",),
    ("name",),
    ("type",),
    ("topologyKey", "whenUnsatisfiable"),
    ("port", "protocol"),
)
# Maps from resource names to quantities, and fields that are one.
_QUANTITIES = frozenset({"requests", "limits"})
_QUANTITY = frozenset({"sizeLimit", "divisor", "storage"})


def stamped(wanted: Object) -> Object:
    """`wanted` with its own hash written on it. `wanted` is changed."""
    metadata = cast("dict[str, Any]", wanted["metadata"])
    annotations = metadata.setdefault("annotations", {})
    annotations.pop(APPLIED, None)
    annotations[APPLIED] = digest(wanted)
    return wanted


def digest(content: object) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def needs_write(wanted: Object, observed: Object | None) -> bool:
    """Whether applying `wanted` (stamped) would change `observed`."""
    return observed is None or not contains(observed, wanted)


def contains(observed: object, wanted: object, key: str = "") -> bool:
    """Every leaf of `wanted` is in `observed`, and equal. `key` is the field they are under."""
    if isinstance(wanted, Mapping):
        return isinstance(observed, Mapping) and _contains_map(
            cast("Mapping[str, Any]", observed), cast("Mapping[str, Any]", wanted), key
        )
    if isinstance(wanted, list | tuple):
        return isinstance(observed, list | tuple) and _contains_list(
            cast("Sequence[Any]", observed), cast("Sequence[Any]", wanted), key
        )
    if wanted == observed and isinstance(wanted, bool) == isinstance(observed, bool):
        return True
    return key in _QUANTITIES | _QUANTITY and _equal_quantities(observed, wanted)


def _contains_map(observed: Mapping[str, Any], wanted: Mapping[str, Any], key: str) -> bool:
    for name, value in wanted.items():
        if name not in observed:
            # The API server leaves out what is empty, false or zero.
            if value:
                return False
            continue
        child = key if key in _QUANTITIES else name
        if not contains(observed[name], value, child):
            return False
    return True


def _contains_list(observed: Sequence[Any], wanted: Sequence[Any], key: str) -> bool:
    """Of a list with keys each item wanted is there; any other list is equal, item by item."""
    keys = _keys_of(wanted)
    if keys is None:
        pairs = zip(observed, wanted, strict=False)
        return len(observed) == len(wanted) and all(contains(o, w, key) for o, w in pairs)
    items = cast("Sequence[Mapping[str, Any]]", [o for o in observed if isinstance(o, Mapping)])
    by_key = {_key(item, keys): item for item in items}
    return all(
        (found := by_key.get(_key(item, keys))) is not None and contains(found, item, key)
        for item in wanted
    )


def _keys_of(items: Sequence[Any]) -> tuple[str, ...] | None:
    if not items or not all(isinstance(item, Mapping) for item in items):
        return None
    for keys in _KEYS:
        if all(keys[0] in item for item in items):
            if len({_key(item, keys) for item in items}) == len(items):
                return keys
            return None
    return None


def _key(item: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, ...]:
    # The protocol that is left out is TCP, in a Service and in a container.
    return tuple(repr(item.get(key, "TCP" if key == "protocol" else None)) for key in keys)


def _equal_quantities(one: object, other: object) -> bool:
    try:
        return quantity(str(one)) == quantity(str(other))
    except ValueError:
        return False
