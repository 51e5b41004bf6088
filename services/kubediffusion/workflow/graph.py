# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A checked graph: nodes with producers first, each port with what feeds it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TypeAlias

from kubediffusion.workflow.expression import Expression
from kubediffusion.workflow.values import Constant, Facts, PortRef, Value


@dataclass(frozen=True, slots=True)
class FromInputs:
    """The first of these inputs that is there; the last one also where it is an empty text."""

    names: tuple[str, ...]

    def choose(self, values: Mapping[str, Value]) -> str | None:
        for name in self.names:
            if values.get(name) not in (None, ""):
                return name
        return self.names[-1] if self.names[-1] in values else None

    def take(
        self, values: Mapping[str, Value], facts: Facts, live: AbstractSet[str]
    ) -> Constant | None:
        name = self.choose(values)
        return None if name is None else Constant(values[name], name)


@dataclass(frozen=True, slots=True)
class FromNodes:
    """The first of these ports whose node runs."""

    ports: tuple[PortRef, ...]

    def take(
        self, values: Mapping[str, Value], facts: Facts, live: AbstractSet[str]
    ) -> PortRef | None:
        for port in self.ports:
            if port.task in live:
                return port
        return None


@dataclass(frozen=True, slots=True)
class Fixed:
    constant: Constant

    def take(
        self, values: Mapping[str, Value], facts: Facts, live: AbstractSet[str]
    ) -> Constant | None:
        return self.constant


@dataclass(frozen=True, slots=True)
class Computed:
    expression: Expression

    def take(
        self, values: Mapping[str, Value], facts: Facts, live: AbstractSet[str]
    ) -> Constant | None:
        value = self.expression.evaluate(values, facts)
        return None if value is None else Constant(value)


Feed: TypeAlias = FromInputs | FromNodes | Fixed | Computed


@dataclass(frozen=True, slots=True)
class Node:
    """One use of a model, its ports wired."""

    name: str
    role: str
    stage: str
    inputs: tuple[tuple[str, Feed], ...]
    outputs: tuple[str, ...]
    when: Expression | None = None


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes with producers first, and the port that is the image."""

    nodes: tuple[Node, ...]
    output: PortRef
    # Bounds that ports put on the inputs that feed them: (minimum, maximum).
    bounds: Mapping[str, tuple[float | None, float | None]] = field(
        default_factory=dict[str, tuple[float | None, float | None]]
    )
    # Of inputs whose default needs facts of the models.
    defaults: Mapping[str, Expression] = field(default_factory=dict[str, Expression])
