# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which models gateways have requests for that may have no task here yet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable


class Needs:
    """By gateway, what it said last (node.proto's Renew), for as long as its lease."""

    def __init__(self) -> None:
        # Set with each change; whoever waits for one clears it first.
        self.changed = asyncio.Event()
        self._named: dict[str, frozenset[str]] = {}

    def set(self, gateway_id: str, identities: Iterable[str]) -> None:
        """All that it needs, whether it is here or not."""
        self._named.pop(gateway_id, None)
        if named := frozenset(identities):
            self._named[gateway_id] = named
        self.changed.set()

    def has(self, gateway_id: str, identity: str) -> bool:
        return identity in self._named.get(gateway_id, ())

    def count(self, identity: str) -> int:
        """Of the gateways that need it."""
        return sum(identity in named for named in self._named.values())
