# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a coordinator knows of its model nodes: values, made anew whenever a node reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class NodeState:
    """One model node as last heard of. Times are seconds on the coordinator's own clock.

    ``loading`` maps a model that is not ready yet to the time at which loading was first seen;
    a node that is ``suspect`` has been silent for longer than it should, but its stream stands.
    """

    address: str
    node_id: str = ""
    incarnation: str = ""
    host_id: str = ""
    fingerprint: str = ""
    ready: frozenset[str] = frozenset()
    loading: Mapping[str, float] = field(default_factory=dict[str, float])
    queued: int = 0
    running: int = 0
    queue_seconds: float = 0.0
    memory_used: int = 0
    memory_limit: int = 0
    draining: bool = False
    suspect: bool = False
    # A node that refused a task for its full queue is left alone until then.
    full_until: float = 0.0
    # When a task was last placed here: a serial number, so that equal nodes take turns.
    last_placed: int = 0
    # Gateways with a stream to it, ourselves included.
    gateways: int = 1
    # Other nodes' leases that it computes a part of.
    helping: int = 0

    def takes_work(self, now: float) -> bool:
        return not self.draining and self.full_until <= now


def serving(nodes: Iterable[NodeState], model: str) -> list[NodeState]:
    """The nodes that can run `model` now, draining ones left out."""
    return [node for node in nodes if model in node.ready and not node.draining]
