# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A graph as written, checked once: names, types, conditions, cycles, and what nobody reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import cast

from kubediffusion.api.load import did_you_mean
from kubediffusion.api.workflow import Graph as GraphSpec
from kubediffusion.api.workflow import GraphNode
from kubediffusion.errors import InvalidWorkflow
from kubediffusion.workflow.expression import Expression, parse
from kubediffusion.workflow.families import Family, Port, PortType, Signature
from kubediffusion.workflow.graph import Computed, Feed, Fixed, FromInputs, FromNodes, Graph, Node
from kubediffusion.workflow.values import Constant, InputSpec, InputType, PortRef, Value

INPUT = "$inputs."


@dataclass(frozen=True)
class Scope:
    """What a graph's nodes may refer to. `path` is where the graph stands, for messages."""

    family: Family
    roles: frozenset[str]
    controlnets: Sequence[str]
    inputs: Mapping[str, InputSpec]
    path: str = "spec.graph"
    # A preset's inputs need not all be read: there may be no T5 encoder to give a length to.
    all_inputs_read: bool = True

    def expression(self, text: str, path: str) -> Expression:
        types = {name: spec.type for name, spec in self.inputs.items()}
        return parse(text, types, self.family.facts, self.roles, path)


def check_graph(spec: GraphSpec, scope: Scope) -> Graph:
    """`spec` with every name looked up and every port's type compared. Raises InvalidWorkflow."""
    return _Checker(spec, scope).check()


class _Checker:
    def __init__(self, spec: GraphSpec, scope: Scope) -> None:
        self._spec = spec
        self._scope = scope
        self._problems: list[InvalidWorkflow] = []
        self._names = {node.name: node for node in spec.nodes}
        self._signatures: dict[str, Signature] = {}
        self._whens: dict[str, Expression | None] = {}
        self._bounds: dict[str, tuple[float | None, float | None]] = {}
        self._read: set[str] = set()

    def check(self) -> Graph:
        for index, node in enumerate(self._spec.nodes):
            self._head(node, f"{self._scope.path}.nodes[{index}]")
        self._raise()
        nodes: dict[str, Node] = {}
        for index, node in enumerate(self._spec.nodes):
            nodes[node.name] = self._node(node, f"{self._scope.path}.nodes[{index}]")
        output = self._output()
        self._raise()
        ordered = self._ordered(nodes)
        self._unused(nodes, output)
        self._raise()
        return Graph(ordered, output, self._bounds, self._defaults())

    def _raise(self) -> None:
        if not self._problems:
            return
        first, *others = self._problems
        message = "\n".join([first.message, *map(str, others)])
        raise InvalidWorkflow(message, field=first.field)

    def _fail(self, path: str, message: str) -> None:
        self._problems.append(InvalidWorkflow(message, field=path))

    # ---- a node's role, stage and condition

    def _head(self, node: GraphNode, path: str) -> None:
        scope = self._scope
        if node.model not in scope.roles:
            hint = did_you_mean(node.model, scope.roles)
            return self._fail(f"{path}.model", f"the workflow has no model {node.model!r}; {hint}")
        signature = scope.family.signature(node.model, node.stage, scope.controlnets)
        if signature is None:
            stages = ", ".join(scope.family.stages.get(node.model, ())) or "none of its own"
            message = f"{node.model} has no stage {node.stage!r}; it has {stages}"
            return self._fail(f"{path}.stage", message)
        self._signatures[node.name] = signature
        self._whens[node.name] = None
        if node.when is not None:
            self._whens[node.name] = self._condition(node.when, f"{path}.when")
        return None

    def _condition(self, text: str, path: str) -> Expression | None:
        try:
            # `not not` asks for a truth value, so that a bare input reads as presence.
            expression = self._scope.expression(f"not not ({text})", path)
            plain = self._scope.expression(text, path)
        except InvalidWorkflow as error:
            self._problems.append(error)
            return None
        self._read |= plain.inputs
        return Expression(text, InputType.FLAG, expression.evaluate, plain.inputs, plain.conjuncts)

    # ---- a node's ports

    def _node(self, node: GraphNode, path: str) -> Node:
        signature = self._signatures[node.name]
        inputs: list[tuple[str, Feed]] = []
        for name, given in node.inputs.items():
            here = f"{path}.inputs.{name}"
            port = signature.inputs.get(name)
            if port is None:
                hint = did_you_mean(name, signature.inputs)
                self._fail(here, f"{node.model} {node.stage} has no port {name!r}; {hint}")
                continue
            try:
                feed = self._feed(node, port, given, here)
            except InvalidWorkflow as error:
                self._problems.append(error)
                continue
            if port.required and isinstance(feed, FromInputs):
                self._check_given(node, feed, here)
            self._narrow(feed, port)
            inputs.append((name, feed))
        for name, port in signature.inputs.items():
            if port.required and name not in node.inputs:
                self._fail(f"{path}.inputs.{name}", f"is required ({port.type})")
        when = self._whens[node.name]
        return Node(
            node.name, node.model, node.stage, tuple(inputs), tuple(signature.outputs), when
        )

    def _feed(self, node: GraphNode, port: Port, given: object, path: str) -> Feed:
        if isinstance(given, list):
            return self._first_of(node, port, cast("list[object]", given), path)
        if port.type.tensor:
            return FromNodes((self._port(node, port, given, path),))
        if isinstance(given, str) and given.startswith("="):
            return self._computed(port, given[1:].strip(), path)
        if isinstance(given, str) and given.startswith("$"):
            return FromInputs((self._input(port, given, path),))
        return Fixed(Constant(_constant(port, given, path)))

    def _first_of(self, node: GraphNode, port: Port, given: list[object], path: str) -> Feed:
        if not given or not all(isinstance(item, str) for item in given):
            raise InvalidWorkflow(
                "a list holds references, the first one there is taken", field=path
            )
        if port.type.tensor:
            refs = [self._port(node, port, item, path, alternative=True) for item in given]
            if port.required and not any(self._always(node, ref.task) for ref in refs):
                raise InvalidWorkflow(
                    "none of these nodes is sure to run where this one runs", field=path
                )
            return FromNodes(tuple(refs))
        return FromInputs(tuple(self._input(port, str(item), path) for item in given))

    def _input(self, port: Port, given: str, path: str) -> str:
        name = given.removeprefix(INPUT)
        if not given.startswith(INPUT):
            raise InvalidWorkflow(f"{given!r} is no reference; write {INPUT}NAME", field=path)
        spec = self._scope.inputs.get(name)
        if spec is None:
            hint = did_you_mean(name, self._scope.inputs)
            raise InvalidWorkflow(f"there is no input {name!r}; {hint}", field=path)
        if not _fits(spec.type, port.type.value):
            message = f"the port takes {port.type}, the input {name} is {spec.type}"
            raise InvalidWorkflow(message, field=path)
        if port.choices:
            message = f"must be a constant: one of {', '.join(port.choices)}"
            raise InvalidWorkflow(message, field=path)
        self._read.add(name)
        return name

    def _port(
        self, node: GraphNode, port: Port, given: object, path: str, alternative: bool = False
    ) -> PortRef:
        """The producer's port; ``NODE.OUTPUT``, where NODE may have dots of its own."""
        if not isinstance(given, str) or "." not in given or given.startswith(("$", "=")):
            message = f"the port takes {port.type}: refer to a node's output as NODE.OUTPUT"
            raise InvalidWorkflow(message, field=path)
        ref = self._lookup(given, path)
        found = self._signatures[ref.task].outputs[ref.port]
        if found != port.type:
            message = f"the port takes {port.type}, {given} is {found}"
            raise InvalidWorkflow(message, field=path)
        if port.required and not alternative and not self._always(node, ref.task):
            message = (
                f"{ref.task} may be left out where this node runs: "
                "give this node the same condition, or list another source after it"
            )
            raise InvalidWorkflow(message, field=path)
        return ref

    def _lookup(self, given: str, path: str) -> PortRef:
        task, _, output = given.rpartition(".")
        signature = self._signatures.get(task)
        if signature is None:
            hint = did_you_mean(task, self._names)
            raise InvalidWorkflow(f"there is no node {task!r}; {hint}", field=path)
        if output not in signature.outputs:
            hint = did_you_mean(output, signature.outputs)
            raise InvalidWorkflow(f"{task} has no output {output!r}; {hint}", field=path)
        return PortRef(task, output)

    def _always(self, reader: GraphNode, producer: str) -> bool:
        """Whether `producer` runs wherever `reader` runs, as far as their conditions say."""
        needed, known = self._whens[producer], self._whens[reader.name]
        if needed is None:
            return True
        return known is not None and needed.conjuncts <= known.conjuncts

    def _check_given(self, node: GraphNode, feed: FromInputs, path: str) -> None:
        """Whether a request that runs `node` is sure to give one of the inputs."""
        when = self._whens[node.name]
        known = when.conjuncts if when else frozenset[str]()
        for name in feed.names:
            spec = self._scope.inputs[name]
            filled = spec.required or spec.default is not None or spec.default_expression
            # Without a seed of its own a request gets one.
            filled = bool(filled) or (name == "seed" and spec.type is InputType.INTEGER)
            needed = f"{INPUT}{spec.requires}" if spec.requires and filled else ""
            if f"{INPUT}{name}" in known or (filled and (not needed or needed in known)):
                return
        name = feed.names[-1]
        self._fail(
            path,
            f"a request may leave {name} out: make it required, give it a default, "
            f"or give this node `when: {INPUT}{name}`",
        )

    def _computed(self, port: Port, text: str, path: str) -> Computed:
        expression = self._scope.expression(text, path)
        if not _fits(expression.type, port.type.value):
            message = f"the port takes {port.type}, this is {expression.type}"
            raise InvalidWorkflow(message, field=path)
        self._read |= expression.inputs
        return Computed(expression)

    def _narrow(self, feed: Feed, port: Port) -> None:
        if not isinstance(feed, FromInputs):
            return
        for name in feed.names:
            low, high = self._bounds.get(name, (None, None))
            lows = [x for x in (low, port.minimum) if x is not None]
            highs = [x for x in (high, port.maximum) if x is not None]
            self._bounds[name] = (max(lows, default=None), min(highs, default=None))

    # ---- the graph as a whole

    def _output(self) -> PortRef:
        path = f"{self._scope.path}.output"
        pixels = PortType(tensor="pixels")
        try:
            ref = self._lookup(self._spec.output, path)
        except InvalidWorkflow as error:
            self._problems.append(error)
            return PortRef("", "")
        found = self._signatures[ref.task].outputs[ref.port]
        if found != pixels:
            self._fail(path, f"a workflow gives a picture, {self._spec.output} is {found}")
        if self._whens[ref.task] is not None:
            self._fail(path, f"{ref.task} may be left out; the output's node has no condition")
        return ref

    def _defaults(self) -> dict[str, Expression]:
        defaults: dict[str, Expression] = {}
        for name, spec in self._scope.inputs.items():
            if not spec.default_expression:
                continue
            path = f"spec.inputs.{name}.default"
            expression = self._scope.expression(spec.default_expression, path)
            if expression.inputs or not _fits(expression.type, spec.type):
                message = f"must be an expression over $facts that gives {spec.type}"
                raise InvalidWorkflow(message, field=path)
            defaults[name] = expression
        return defaults

    def _ordered(self, nodes: Mapping[str, Node]) -> tuple[Node, ...]:
        """Producers first, else as written."""
        waits = {name: set(_producers(node)) for name, node in nodes.items()}
        ordered: list[Node] = []
        while waits:
            ready = next((name for name, producers in waits.items() if not producers), None)
            if ready is None:
                circle = " -> ".join(_circle(waits))
                message = f"nodes wait for each other: {circle}"
                raise InvalidWorkflow(message, field=f"{self._scope.path}.nodes")
            del waits[ready]
            for producers in waits.values():
                producers.discard(ready)
            ordered.append(nodes[ready])
        return tuple(ordered)

    def _unused(self, nodes: Mapping[str, Node], output: PortRef) -> None:
        used, pending = {output.task}, [output.task]
        while pending:
            for name in _producers(nodes[pending.pop()]):
                if name not in used:
                    used.add(name)
                    pending.append(name)
        for index, node in enumerate(self._spec.nodes):
            if node.name not in used:
                path = f"{self._scope.path}.nodes[{index}]"
                self._fail(path, f"nobody reads what {node.name!r} makes; wire it up or remove it")
        if self._scope.all_inputs_read:
            for name in self._scope.inputs:
                if name not in self._read:
                    self._fail(f"spec.inputs.{name}", "no node reads this input; remove it")


def _producers(node: Node) -> Iterator[str]:
    for _, feed in node.inputs:
        if isinstance(feed, FromNodes):
            yield from (ref.task for ref in feed.ports)


def _circle(waits: Mapping[str, AbstractSet[str]]) -> list[str]:
    """One circle among nodes that all wait for another."""
    trail = [next(iter(waits))]
    while trail[-1] not in trail[:-1]:
        trail.append(min(waits[trail[-1]]))
    return trail[trail.index(trail[-1]) :]


def _fits(given: InputType | None, wanted: InputType | None) -> bool:
    return given == wanted or (given, wanted) == (InputType.INTEGER, InputType.NUMBER)


def _constant(port: Port, given: object, path: str) -> Value:
    kinds: dict[InputType, tuple[type, ...]] = {
        InputType.TEXT: (str,),
        InputType.INTEGER: (int,),
        InputType.NUMBER: (int, float),
        InputType.FLAG: (bool,),
    }
    wanted = kinds.get(port.type.value, ()) if port.type.value else ()
    is_flag = isinstance(given, bool)
    if not isinstance(given, wanted) or is_flag != (port.type.value is InputType.FLAG):
        raise InvalidWorkflow(f"the port takes {port.type}, which {given!r} is not", field=path)
    if port.choices and given not in port.choices:
        hint = did_you_mean(str(given), port.choices)
        raise InvalidWorkflow(f"{given!r} is not known here; {hint}", field=path)
    assert isinstance(given, (str, int, float, bool))
    if isinstance(given, (int, float)) and (
        (port.minimum is not None and given < port.minimum)
        or (port.maximum is not None and given > port.maximum)
    ):
        message = f"{given} is out of bounds: {port.minimum} to {port.maximum}"
        raise InvalidWorkflow(message, field=path)
    return float(given) if port.type.value is InputType.NUMBER else given
