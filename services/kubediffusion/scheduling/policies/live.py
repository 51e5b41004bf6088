# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The policies that can lead a live gateway, by name.

Only those that place leases: the wire has no task for a single step (DiFlow), and nodes are not
told to swap whole pipelines (the monoliths). What needs two nodes for one lease is off, because
nodes do not help each other yet; so is batching, which a node does by itself and only in
``numerics: fast``; and planning, because residency is the operator's, or the supervisor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kubediffusion.errors import InvalidInput
from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.policies.kubediffusion import KubeDiffusion, Parameters
from kubediffusion.scheduling.policy import LivePolicy, Node

# Task by task, by `scheduling.placement`: no policy at all.
QUEUE = "queue"
_PRESETS: dict[str, dict[str, Any]] = {
    "kubediffusion": {},
    "kubediffusion-fair": {"laxity": 1.0, "floor": 0.9},
}
NAMES = (QUEUE, *_PRESETS)


def known_policy(name: str) -> str:
    """The name, if a gateway has it. Raises InvalidInput."""
    if name not in NAMES:
        raise InvalidInput(
            f"there is no policy {name!r} for a gateway; take one of {', '.join(NAMES)}",
            field="policy",
        )
    return name


def live_parameters(name: str) -> Parameters:
    """Of any but `QUEUE`. Raises InvalidInput for a name that is not known."""
    known_policy(name)
    return Parameters(sampler=0.0, batch=1, split=False, **_PRESETS[name])


def live_policy(name: str, nodes: Sequence[Node]) -> LivePolicy:
    """It knows no pipeline before it is told (`learnt`). Raises InvalidInput."""
    return KubeDiffusion(nodes, Costs({}), (), live_parameters(name))
