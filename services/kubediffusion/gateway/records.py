# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The nodes as a policy sees them, kept true from what nodes report.

A node keeps its place for as long as it is on the list; a place whose node is gone is given to the
next new one. Drained, silent and unreachable nodes are not up. A node that loads is: what it has
already it can run, and downloads take long.
"""

from __future__ import annotations

from kubediffusion.gateway.connections import NodeConnection
from kubediffusion.gateway.nodes import Fleet
from kubediffusion.scheduling.policy import Node
from kubediffusion.scheduling.translation import Translator

# Seconds that a node is left alone: one with others' work, at least, and one that was full.
_ASK_AGAIN = 0.01
_FULL = 0.1


class Records:
    def __init__(self, fleet: Fleet, translator: Translator) -> None:
        self.nodes: list[Node] = []
        self.addresses: list[str] = []
        # Places with a work of ours, maybe on a node that was taken off the list meanwhile.
        self.busy: set[int] = set()
        # Whether other gateways have streams to some node.
        self.shared = False
        self._fleet = fleet
        self._translator = translator
        self._places: dict[str, int] = {}
        self._hosts: dict[str, int] = {}
        self._ready: dict[str, frozenset[str]] = {}
        self._kinds: dict[str, str] = {}
        self._others: dict[str, frozenset[str]] = {}

    def refresh(self, now: float) -> bool:
        """Whether a node came or went, or its models changed."""
        connections = self._fleet.connections
        ready: dict[str, frozenset[str]] = {}
        kinds: dict[str, str] = {}
        self.shared = any(
            connection.state is not None and connection.state.gateways > 1
            for connection in connections.values()
        )
        for address, connection in connections.items():
            place = self._places.get(address)
            if place is None:
                place = self._settle(address)
            state = connection.state
            node = self.nodes[place]
            if state is not None and not state.draining and not state.suspect:
                ready[address] = state.ready
                kinds[address] = state.fingerprint
                node.host = self._hosts.setdefault(state.host_id or address, len(self._hosts))
            node.foreign_until = self._foreign(connection, now) if self.shared else 0.0
        if ready == self._ready and kinds == self._kinds:
            return False
        self._ready, self._kinds = ready, kinds
        self._others.clear()
        self._translator.set_nodes(ready)
        for node, address in zip(self.nodes, self.addresses, strict=True):
            node.up = address in ready
        self.show()
        return True

    def show(self) -> None:
        """What each node holds, in the policy's words."""
        for node, address in zip(self.nodes, self.addresses, strict=True):
            node.resident = self._translator.held(address)

    def others(self, fingerprint: str) -> frozenset[str]:
        """The nodes that are up and of another kind, which cannot go on from its checkpoints."""
        found = self._others.get(fingerprint)
        if found is None:
            found = frozenset(a for a, kind in self._kinds.items() if kind != fingerprint)
            self._others[fingerprint] = found
        return found

    def _settle(self, address: str) -> int:
        """A place for a new node: that of one which is gone for good, or one more."""
        for place, node in enumerate(self.nodes):
            old = self.addresses[place]
            if not node.up and old not in self._fleet.connections and place not in self.busy:
                self._places.pop(old, None)
                break
        else:
            place = len(self.nodes)
            self.nodes.append(Node(place, 0, 0.0, up=False))
            self.addresses.append("")
        self.addresses[place] = address
        self._places[address] = place
        return place

    @staticmethod
    def _foreign(connection: NodeConnection, now: float) -> float:
        """Until when it is not ours: work of other gateways, by its last report, or a refusal.

        Reports do not say whose the work is; beside others, what is more than ours is theirs.
        """
        state = connection.state
        if state is None:
            return 0.0
        until = min(state.full_until, now + _FULL) if state.full_until > now else 0.0
        if state.gateways > 1 and state.queued + state.running > connection.assigned:
            # From the report on, not from now: at that moment we ask the node, and if others took
            # it meanwhile it is the node that says whose turn is first.
            theirs = connection.load.queued_seconds - connection.expected_seconds
            until = max(until, connection.reported_at + max(_ASK_AGAIN, theirs))
        return until
