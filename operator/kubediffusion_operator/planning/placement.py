# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which models of a pool are on which of its nodes: a bin packing that moves as little as it can.

A model stays where it is while it fits there. Every model gets one copy before any gets a second;
the one with the most demand chooses first, and takes the node with the most room. Where a first
copy finds no room, second copies of others go, and if that is not enough, all is packed anew, the
largest first: only then does a model move.

A denoiser takes its ControlNets along, and denoisers on one node share one that helps both. Where
some model would have no place for their sake, they get what room the models leave.

A size that nobody knows yet counts as nothing: the model goes to the node with the most room, and
the node finds out. A model that turns out too large is refused by its node, which then knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

# A plan made of itself is that plan again after one or two rounds; never more than so many.
ROUNDS = 16
# Of models and nodes: their names.
Plan = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Item:
    """A model. `copies` is its demand, at least 0; `size` is in bytes, 0 where unknown. `helpers`
    are the sizes of the models that go wherever it goes, by name."""

    name: str
    copies: int
    size: int = 0
    helpers: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def total(self) -> int:
        return self.size + sum(self.helpers.values())


@dataclass(frozen=True, slots=True)
class Placed:
    """`plan` has an entry for each model with a copy; `left` are those that fit nowhere, and
    `without` the helpers for which there is no room beside their model, by its name."""

    plan: Plan
    left: tuple[str, ...] = ()
    without: Plan = field(default_factory=dict[str, "tuple[str, ...]"])


def place(items: Iterable[Item], nodes: Mapping[str, int], now: Plan) -> Placed:
    """`nodes` maps names to bytes that models may take there, 0 for no limit; `now` is the plan so
    far, which may name models and nodes that are gone. Helpers are not in the plan: they are where
    their models are."""
    wanted = [item for item in items if item.copies > 0]
    if not any(item.helpers for item in wanted):
        return _placed(wanted, nodes, now)
    placed = _beside(wanted, nodes, now)
    # Each time fewer are left, or more of those that help have a place.
    for _ in range(ROUNDS):
        if (again := _beside(wanted, nodes, placed.plan)) == placed:
            break
        placed = again
    return placed


def _beside(items: Sequence[Item], nodes: Mapping[str, int], now: Plan) -> Placed:
    """With all helpers, unless a model would have no place for their sake; then with those for
    which the models leave room, the smallest first."""
    whole = _placed(items, nodes, now)
    bare = _placed([replace(item, helpers={}) for item in items], nodes, now)
    if len(whole.left) <= len(bare.left):
        return whole
    board = _Board(dict(nodes))
    there = [item for item in _by_demand(items) if item.name in bare.plan]
    for item in there:
        for node in bare.plan[item.name]:
            board.put(replace(item, helpers={}), node)
    without = {item.name: _crowded(board, item, bare.plan[item.name]) for item in there}
    return replace(bare, without={name: gone for name, gone in without.items() if gone})


def _crowded(board: _Board, item: Item, nodes: Sequence[str]) -> tuple[str, ...]:
    """Puts those helpers beside their model that fit on all its nodes; returns the others."""
    kept, gone = replace(item, helpers={}), list[str]()
    for name, size in sorted(item.helpers.items(), key=lambda each: (each[1], each[0])):
        more = replace(item, helpers={**kept.helpers, name: size})
        if all(board.fits(more, node, gone=(kept,)) for node in nodes):
            kept = more
            for node in nodes:
                board.put(kept, node)
        else:
            gone.append(name)
    return tuple(sorted(gone))


def _by_demand(items: Iterable[Item]) -> list[Item]:
    return sorted(items, key=lambda item: (-item.copies, -item.total, item.name))


def _placed(items: Iterable[Item], nodes: Mapping[str, int], now: Plan) -> Placed:
    by_demand = _by_demand(items)
    placed = _once(by_demand, nodes, now)
    # Where a second copy has found a place, the first one may make room for somebody else.
    for _ in range(ROUNDS):
        if (again := _once(by_demand, nodes, placed.plan)) == placed:
            break
        placed = again
    return placed


def _once(by_demand: Sequence[Item], nodes: Mapping[str, int], now: Plan) -> Placed:
    board = _Board(dict(nodes))
    _keep(board, by_demand, now)
    left = _first_copies(board, by_demand)
    if left:
        packed = _Board(dict(nodes))
        largest = sorted(by_demand, key=lambda item: (-item.total, item.name))
        if len(_first_copies(packed, largest, now)) < len(left):
            board = packed
            left = [item for item in by_demand if not board.nodes_of(item)]
    _more_copies(board, by_demand, now)
    return Placed(board.plan(), tuple(sorted(item.name for item in left)))


@dataclass
class _Board:
    """Models on nodes, while they are being moved about."""

    limits: dict[str, int]
    on: dict[str, dict[str, Item]] = field(default_factory=dict[str, "dict[str, Item]"])

    def __post_init__(self) -> None:
        self.on = {node: {} for node in self.limits}

    def plan(self) -> Plan:
        found: dict[str, list[str]] = {}
        for node in sorted(self.on):
            for name in self.on[node]:
                found.setdefault(name, []).append(node)
        return {name: tuple(found[name]) for name in sorted(found)}

    def nodes_of(self, item: Item) -> list[str]:
        return [node for node, items in self.on.items() if item.name in items]

    def room(self, node: str) -> float:
        limit = self.limits[node]
        return limit - _bytes(self.on[node].values()) if limit else float("inf")

    def fits(self, item: Item, node: str, gone: Sequence[Item] = ()) -> bool:
        """Beside what is there, but for those that are `gone`."""
        limit = self.limits[node]
        others = [
            each for name, each in self.on[node].items() if name not in {g.name for g in gone}
        ]
        return not limit or _bytes([*others, item]) <= limit

    def put(self, item: Item, node: str) -> None:
        self.on[node][item.name] = item

    def take(self, item: Item, node: str) -> None:
        del self.on[node][item.name]

    def roomiest(self, item: Item, prefer: Sequence[str] = ()) -> str | None:
        """The node for one more copy: a preferred one, else the one with the most room."""
        fit = [n for n in self.on if item.name not in self.on[n] and self.fits(item, n)]
        return min(
            fit,
            key=lambda n: (n not in prefer, -self.room(n), len(self.on[n]), n),
            default=None,
        )

    def spare(self, node: str) -> list[Item]:
        """Copies there that are not their model's only one, the largest first."""
        items = [item for item in self.on[node].values() if len(self.nodes_of(item)) > 1]
        return sorted(items, key=lambda item: (-item.total, item.name))


def _bytes(items: Iterable[Item]) -> int:
    """What they take on one node, on which a helper of several of them is once."""
    sizes: dict[str, int] = {}
    for item in items:
        sizes |= item.helpers
        sizes[item.name] = item.size
    return sum(sizes.values())


def _keep(board: _Board, items: Sequence[Item], now: Plan) -> None:
    """What is there stays, as far as it is wanted and fits; the last come goes first."""
    for item in items:
        for node in now.get(item.name, ()):
            if node in board.on and board.fits(item, node):
                board.put(item, node)
    for item in items:
        nodes = board.nodes_of(item)
        # Surplus copies leave the fullest nodes.
        for node in sorted(nodes, key=lambda n: (board.room(n), n))[: len(nodes) - item.copies]:
            board.take(item, node)


def _first_copies(board: _Board, items: Sequence[Item], now: Plan | None = None) -> list[Item]:
    """One copy for each that has none. Returns those for which there is no room."""
    left: list[Item] = []
    for item in items:
        if board.nodes_of(item):
            continue
        node = board.roomiest(item, (now or {}).get(item.name, ())) or _cleared(board, item)
        if node is None:
            left.append(item)
        else:
            board.put(item, node)
    return left


def _cleared(board: _Board, item: Item) -> str | None:
    """A node that has room once copies that others have elsewhere are gone; they are taken."""
    best: tuple[int, str, list[Item]] | None = None
    for node in sorted(board.on):
        gone: list[Item] = []
        for other in board.spare(node):
            if board.fits(item, node, gone):
                break
            gone.append(other)
        cost = sum(other.total for other in gone)
        if board.fits(item, node, gone) and (best is None or cost < best[0]):
            best = (cost, node, gone)
    if best is None:
        return None
    for other in best[2]:
        board.take(other, best[1])
    return best[1]


def _more_copies(board: _Board, items: Sequence[Item], now: Plan) -> None:
    """Second copies for all that want one, then third ones, while there is room."""
    for number in range(2, max((item.copies for item in items), default=0) + 1):
        placed = False
        for item in items:
            if item.copies >= number and len(board.nodes_of(item)) == number - 1:
                node = board.roomiest(item, now.get(item.name, ()))
                if node is not None:
                    board.put(item, node)
                    placed = True
        if not placed and all(len(board.nodes_of(item)) < number for item in items):
            return
