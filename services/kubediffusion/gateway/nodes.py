# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""All nodes of one gateway: where tasks go, what is known of their models, who waits for them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

from kubediffusion.errors import KubeDiffusionError, NotFound, Unavailable
from kubediffusion.gateway.config import NodeLimits
from kubediffusion.gateway.connections import NodeConnection
from kubediffusion.scheduling.assist import place_apart
from kubediffusion.scheduling.fleet import NodeState, serving
from kubediffusion.scheduling.placement import Placement, PlacementTask, place
from kubediffusion.scheduling.profiles import Profiles
from kubediffusion.tensors import value_of
from kubediffusion.v1alpha1 import node_pb2

Facts: TypeAlias = "Mapping[str, str | int | float | bool]"


class Fleet:
    """Connections by address. A FleetListener of each of them."""

    def __init__(
        self,
        gateway_id: str,
        limits: NodeLimits,
        now: Callable[[], float],
        profiles: Profiles,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`draw` gives random numbers from 0 up to 1, for choosing beside other gateways."""
        self.profiles = profiles
        self.now = now
        self._draw = draw
        # Kept when the nodes go: a request can be checked while its model has no replica.
        self.facts: dict[str, Facts] = {}
        self.connections: dict[str, NodeConnection] = {}
        # See `need`.
        self.needed: frozenset[str] = frozenset()
        self._retired: list[NodeConnection] = []
        # Who has a model, or will have it; made anew when that has changed.
        self._by_model: dict[str, list[NodeConnection]] = {}
        self._gateway_id = gateway_id
        self._limits = limits
        self._serial = 0
        self._waiting: dict[Callable[[], None], None] = {}
        self._watchers: list[Callable[[], None]] = []
        self._loads_seen: dict[tuple[str, str], str] = {}
        self._closed = False
        self._workflows: frozenset[str] = frozenset()
        self._kept: frozenset[str] | None = None

    def set_nodes(self, addresses: Iterable[str]) -> None:
        """The nodes to use from now on; one that is left out ends what it was given."""
        wanted = dict.fromkeys(addresses)
        for address in [a for a in self.connections if a not in wanted]:
            connection = self.connections.pop(address)
            connection.retire()
            self._retired.append(connection)
        self._retired = [connection for connection in self._retired if not connection.ended]
        for address in wanted:
            if address not in self.connections:
                self.connections[address] = self._revived(address) or self._connect(address)
        self.changed()

    def _connect(self, address: str) -> NodeConnection:
        connection = NodeConnection(address, self._gateway_id, self._limits, self, self.now)
        connection.start()
        return connection

    def _revived(self, address: str) -> NodeConnection | None:
        """One that was retired and has not ended: a second stream would end what runs on it."""
        for connection in self._retired:
            if connection.address == address and connection.revive():
                self._retired.remove(connection)
                return connection
        return None

    async def stop(self) -> None:
        self._closed = True
        self._waiting.clear()
        connections = [*self.connections.values(), *self._retired]
        await asyncio.gather(*(connection.stop() for connection in connections))

    # ------------------------------------------------------------ placement

    def states(self) -> list[NodeState]:
        states = (connection.state for connection in self.connections.values())
        return [state for state in states if state is not None]

    def states_with(self, model: str) -> list[NodeState]:
        """The nodes that have a model or are loading it; the rest cannot matter to its tasks."""
        states = (connection.state for connection in self._by_model.get(model, ()))
        return [state for state in states if state is not None]

    def place(self, task: PlacementTask) -> Placement | None:
        # The hosts of inputs count too, whatever models they have.
        nodes = self.states() if task.inputs else self.states_with(task.model)
        found = place(task, nodes, self.profiles, self.now(), self._draw)
        if found is None and task.helpers:
            apart = place_apart(task, nodes, self.states(), self._stands_alone, self.now())
            found = place(*apart, self.profiles, self.now(), self._draw)
        return found

    def _stands_alone(self, model: str) -> bool:
        """Whether a ControlNet can be on another node than its denoiser: borrows nothing of it."""
        return bool(self.facts.get(model, {}).get("own_pos_embed", True))

    def place_leaving(self, task: PlacementTask) -> tuple[NodeConnection, Placement] | None:
        """On a node that is going, for a task whose models nobody else will have: see `need`."""
        leaving = {
            connection.address: connection
            for connection in (*self._retired, *self.connections.values())
            if connection.leaving and connection.address not in task.failed_on
        }
        states = (connection.state for connection in leaving.values())
        nodes = [replace(state, draining=False) for state in states if state is not None]
        placement = place(task, nodes, self.profiles, self.now(), self._draw)
        if placement is None or not placement.ready:
            return None
        return leaving[placement.address], placement

    def observe_transfer(
        self, to: NodeConnection, nbytes: Mapping[str, int], seconds: float
    ) -> None:
        """`to` pulled so many bytes from each of these addresses, all in `seconds`."""
        away = {address: n for address, n in nbytes.items() if address != to.address}
        ways = {self._same_host(address, to) for address in away}
        if len(ways) == 1:  # of a mixture nobody knows which took how long
            self.profiles.observe_transfer(ways.pop(), sum(away.values()), seconds)

    def _same_host(self, address: str, other: NodeConnection) -> bool:
        one = self.connections.get(address)
        return one is not None and bool(one.host_id) and one.host_id == other.host_id

    def next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def holds(self, address: str, incarnation: str) -> bool:
        """Whether the process that made a tensor is still there."""
        return any(
            connection is not None
            and connection.address == address
            and connection.incarnation == incarnation
            for connection in (self.connections.get(address), *self._retired)
        )

    def missing(self, models: Iterable[str]) -> tuple[str, ...]:
        """Those of `models` that no node can run now."""
        return tuple(m for m in dict.fromkeys(models) if not serving(self.states_with(m), m))

    def why_missing(self, model: str) -> str:
        """What the nodes say of a model that none of them serves; empty if nothing."""
        for connection in self.connections.values():
            if connection.description is None:
                continue
            for status in connection.description.models:
                if status.identity == model and status.state == node_pb2.MODEL_STATE_FAILED:
                    return f"{connection.node_id}: {status.reason}: {status.message}"
        return ""

    def keep(self, workflows: frozenset[str], models: frozenset[str]) -> None:
        """What there is from now on: workflows by name, and models that somebody will keep up."""
        self._workflows, self._kept = workflows, models
        self.changed()

    def need(self, models: frozenset[str]) -> None:
        """What requests under way will still use, and nobody may keep: nodes that have it are asked
        to stay, and planners not to take it away."""
        if models != self.needed:
            self.needed = models
            for connection in (*self.connections.values(), *self._retired):
                connection.renew()

    def abandoned(self, workflow: str, models: Iterable[str]) -> KubeDiffusionError | None:
        """Why waiting for one of these models is of no use, for a request of that workflow: no node
        has it, and none will. None where it is of use, or where nobody said what there is."""
        if self._kept is None:
            return None
        gone = [model for model in self.missing(models) if model not in self._kept]
        if not gone:
            return None
        if workflow not in self._workflows:
            return NotFound(
                f"workflow {workflow!r} was deleted while the request was under way, and its "
                f"{gone[0]} with it",
                field="workflow",
            )
        return Unavailable(
            f"workflow {workflow!r} was changed while the request was under way, and {gone[0]}, "
            "which it had before, is gone; send the request again",
            reason="RevisionGone",
        )

    # ------------------------------------------------------------ waiting for a node

    def wait(self, retry: Callable[[], None]) -> None:
        """`retry` is called on each change until `unwait`."""
        self._waiting[retry] = None

    def unwait(self, retry: Callable[[], None]) -> None:
        self._waiting.pop(retry, None)

    def watch(self, look: Callable[[], None]) -> None:
        """`look` is called on each change, for as long as the fleet lasts, before who waits."""
        self._watchers.append(look)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def changed(self) -> None:
        if self._closed:
            return
        self._index()
        for look in self._watchers:
            look()
        for retry in list(self._waiting):
            if retry in self._waiting:
                retry()

    def room(self, connection: NodeConnection) -> None:
        """Whoever waited longest comes first, and nobody asks in vain."""
        for retry in list(self._waiting):
            state = connection.state
            if self._closed or state is None or not state.takes_work(self.now()):
                return
            if retry in self._waiting:
                retry()

    def _index(self) -> None:
        self._by_model = {}
        for connection in self.connections.values():
            state = connection.state
            if state is not None:
                for model in (*state.ready, *state.loading):
                    self._by_model.setdefault(model, []).append(connection)

    def described(self, connection: NodeConnection, models: list[node_pb2.ModelStatus]) -> None:
        for model in models:
            if model.state != node_pb2.MODEL_STATE_READY:
                continue
            facts = {name: value_of(value) for name, value in model.facts.items()}
            self.facts[model.identity] = {
                name: fact
                for name, fact in facts.items()
                if isinstance(fact, str | int | float | bool)
            }
            seen = (connection.address, model.identity)
            if self._loads_seen.get(seen) != connection.incarnation:
                self._loads_seen[seen] = connection.incarnation
                self.profiles.observe_load(model.identity, model.load_seconds)

    def forget_models(self, keep: frozenset[str]) -> frozenset[str]:
        """All others, but for those that some node has: it will not tell of them again, and the
        next workflow may want them. Returns what is kept."""
        keep = keep | self._by_model.keys()
        self.facts = {model: facts for model, facts in self.facts.items() if model in keep}
        self._loads_seen = {k: v for k, v in self._loads_seen.items() if k[1] in keep}
        self.profiles.forget_models(keep)
        return keep
