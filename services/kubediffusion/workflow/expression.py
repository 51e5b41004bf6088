# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The small language of `when` conditions and computed ports.

    $inputs.guidance > 1 and $inputs.image
    2 if $inputs.guidance > 1 else 1
    $facts.transformer.sample_size * $facts.vae.vae_scale_factor

Literals, references, comparison (not chained), ``and or not``, ``A if C else B`` and ``+ - *``.
Python's parser reads it, a whitelist of its nodes is compiled to closures: no names, no calls, no
attributes, nothing that loops. A reference to an input alone, where a truth value is wanted, asks
whether it is there: given, and no empty text; a flag is its own truth.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kubediffusion.api.load import did_you_mean
from kubediffusion.errors import InvalidWorkflow
from kubediffusion.workflow.values import Facts, InputType, Value

MAX_LENGTH = 4096

Evaluate: TypeAlias = Callable[[Mapping[str, Value], Facts], "Value | None"]


class MissingFactError(LookupError):
    """A fact that no node has told yet. `args` are role and name."""


@dataclass(frozen=True)
class Expression:
    """A checked expression and the type of what it gives."""

    text: str
    type: InputType
    evaluate: Evaluate = field(compare=False, repr=False)
    inputs: frozenset[str] = frozenset()
    # Conditions that all have to hold, in canonical spelling: `a and b` gives two.
    conjuncts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Fact:
    """A fact that a model may tell. Without a default, what needs it waits for a node."""

    type: InputType
    default: Value | None = None


_REFERENCE = re.compile(r"\$(inputs|facts)((?:\.[A-Za-z0-9_-]+)+)")
_STRING = re.compile(r"'[^'\\]*'|\"[^\"\\]*\"")
_PLACEHOLDER = "__reference_"
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], object]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_LITERALS: dict[type, InputType] = {
    bool: InputType.FLAG,
    int: InputType.INTEGER,
    float: InputType.NUMBER,
    str: InputType.TEXT,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
_NUMERIC = (InputType.INTEGER, InputType.NUMBER)


def parse(
    text: str,
    inputs: Mapping[str, InputType],
    facts: Mapping[str, Fact],
    roles: frozenset[str],
    path: str = "",
) -> Expression:
    """The expression `text`, checked against the names and types it may use.

    Raises InvalidWorkflow with field `path` for all that is wrong with it.
    """
    return _Parser(text, inputs, facts, roles, path).parse()


@dataclass(frozen=True)
class _Term:
    type: InputType
    evaluate: Evaluate
    # How it reads as a truth value, where that differs from bool(value).
    spelling: str
    literal: bool = False


class _Parser:
    def __init__(
        self,
        text: str,
        inputs: Mapping[str, InputType],
        facts: Mapping[str, Fact],
        roles: frozenset[str],
        path: str,
    ) -> None:
        self._text = text
        self._inputs = inputs
        self._facts = facts
        self._roles = roles
        self._path = path
        self._references: list[tuple[str, str]] = []
        self._used: set[str] = set()

    def parse(self) -> Expression:
        if len(self._text) > MAX_LENGTH:
            raise self._error(f"longer than {MAX_LENGTH} characters")
        if _PLACEHOLDER in self._text:
            raise self._error(f"{_PLACEHOLDER} is a reserved word")
        try:
            tree = ast.parse(self._without_references(), mode="eval")
            term = self._term(tree.body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise self._error("cannot be read as an expression; see docs/workflow.md") from None
        conjuncts = self._conjuncts(tree.body)
        return Expression(
            self._text, term.type, term.evaluate, frozenset(self._used), frozenset(conjuncts)
        )

    def _without_references(self) -> str:
        """References become placeholder names, which Python's grammar can read."""

        def placeholder(match: re.Match[str]) -> str:
            self._references.append((match[1], match[2][1:]))
            return f" {_PLACEHOLDER}{len(self._references) - 1} "

        # Quoted text is left alone: a reference in it is no reference.
        pieces: list[str] = []
        end = 0
        for quoted in _STRING.finditer(self._text):
            pieces.append(_REFERENCE.sub(placeholder, self._text[end : quoted.start()]))
            pieces.append(quoted[0])
            end = quoted.end()
        pieces.append(_REFERENCE.sub(placeholder, self._text[end:]))
        return "".join(pieces).strip()

    def _error(self, message: str) -> InvalidWorkflow:
        return InvalidWorkflow(f"{self._text[:80]!r}: {message}", field=self._path)

    def _conjuncts(self, node: ast.expr) -> set[str]:
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
            return {c for value in node.values for c in self._conjuncts(value)}
        return {self._term(node).spelling}

    def _term(self, node: ast.expr) -> _Term:
        match node:
            case ast.Constant():
                return self._literal(node)
            case ast.Name():
                return self._reference(node)
            case ast.BoolOp():
                return self._bool(node)
            case ast.UnaryOp(op=ast.Not()):
                inner = self._truth(node.operand)
                evaluate = inner.evaluate
                return _Term(
                    InputType.FLAG, lambda v, f: not evaluate(v, f), f"not ({inner.spelling})"
                )
            case ast.UnaryOp(op=ast.USub()):
                return self._arithmetic(ast.BinOp(ast.Constant(0), ast.Sub(), node.operand))
            case ast.BinOp():
                return self._arithmetic(node)
            case ast.Compare():
                return self._compare(node)
            case ast.IfExp():
                return self._choice(node)
            case _:
                raise self._error(
                    "only literals, $inputs.NAME, $facts.ROLE.NAME, comparisons, and, or, not, "
                    "A if C else B, + - * are allowed"
                )

    def _literal(self, node: ast.Constant) -> _Term:
        value = node.value
        if not isinstance(value, (bool, int, float, str)):
            raise self._error("a literal is a number, a quoted text, True or False")
        kind = _LITERALS[type(value)]
        if isinstance(value, (int, float)) and not abs(value) < 2**63:
            raise self._error("a number is out of range")
        constant: Value = value
        return _Term(kind, lambda v, f: constant, repr(value), literal=True)

    def _reference(self, node: ast.Name) -> _Term:
        if not node.id.startswith(_PLACEHOLDER):
            if node.id in ("true", "false"):
                raise self._error(f"write {node.id.title()}")
            raise self._error(f"{node.id!r} is no reference; write $inputs.{node.id}")
        space, name = self._references[int(node.id.removeprefix(_PLACEHOLDER))]
        return self._input(name) if space == "inputs" else self._fact(name)

    def _input(self, name: str) -> _Term:
        if name not in self._inputs:
            hint = did_you_mean(name, self._inputs)
            raise self._error(f"there is no input {name!r}; {hint}")
        self._used.add(name)
        return _Term(self._inputs[name], lambda v, f: v.get(name), f"$inputs.{name}")

    def _fact(self, path: str) -> _Term:
        role, _, name = path.rpartition(".")
        if role not in self._roles:
            hint = did_you_mean(role, self._roles)
            raise self._error(f"the workflow has no model {role!r}; {hint}")
        fact = self._facts.get(name)
        if fact is None:
            hint = did_you_mean(name, self._facts)
            raise self._error(f"models tell no fact {name!r}; {hint}")
        default = fact.default

        def evaluate(values: Mapping[str, Value], facts: Facts) -> Value:
            value = facts.get(role, {}).get(name, default)
            if value is None:
                raise MissingFactError(role, name)
            return value

        return _Term(fact.type, evaluate, f"$facts.{path}")

    def _truth(self, node: ast.expr) -> _Term:
        term = self._term(node)
        if term.type is InputType.FLAG:
            return term
        if not term.spelling.startswith("$inputs."):
            raise self._error(
                f"{term.spelling} is no truth value; compare it, such as {term.spelling} > 0"
            )
        evaluate = term.evaluate
        return _Term(
            InputType.FLAG,
            lambda v, f: evaluate(v, f) not in (None, "", b""),
            term.spelling,
        )

    def _bool(self, node: ast.BoolOp) -> _Term:
        terms = [self._truth(value) for value in node.values]
        parts = [term.evaluate for term in terms]
        is_and = isinstance(node.op, ast.And)
        spelling = "(" + (" and " if is_and else " or ").join(t.spelling for t in terms) + ")"
        if is_and:
            return _Term(InputType.FLAG, lambda v, f: all(p(v, f) for p in parts), spelling)
        return _Term(InputType.FLAG, lambda v, f: any(p(v, f) for p in parts), spelling)

    def _compare(self, node: ast.Compare) -> _Term:
        if len(node.ops) != 1 or type(node.ops[0]) not in _COMPARE:
            raise self._error("compare two things with one of == != < <= > >=, joined by and")
        left, right = self._term(node.left), self._term(node.comparators[0])
        kind = type(node.ops[0])
        ordered = kind not in (ast.Eq, ast.NotEq)
        if not _comparable(left.type, right.type, ordered):
            raise self._error(f"{left.spelling} and {right.spelling} cannot be compared this way")
        compare, a, b = _COMPARE[kind], left.evaluate, right.evaluate

        def evaluate(values: Mapping[str, Value], facts: Facts) -> bool:
            x, y = a(values, facts), b(values, facts)
            # What is absent is neither more nor less nor equal: only != holds.
            if x is None or y is None:
                return kind is ast.NotEq
            return bool(compare(x, y))

        symbol = ast.unparse(ast.Compare(ast.Name("a"), node.ops, [ast.Name("b")]))[2:-2]
        return _Term(InputType.FLAG, evaluate, f"{left.spelling} {symbol} {right.spelling}")

    def _arithmetic(self, node: ast.BinOp) -> _Term:
        operation = _ARITHMETIC.get(type(node.op))
        if operation is None:
            raise self._error("of arithmetic only + - * are allowed")
        left, right = self._term(node.left), self._term(node.right)
        for term in (left, right):
            if term.type not in _NUMERIC:
                raise self._error(f"{term.spelling} is no number")
        both = InputType.INTEGER if left.type == right.type == InputType.INTEGER else None
        calculate, a, b = operation, left.evaluate, right.evaluate

        def evaluate(values: Mapping[str, Value], facts: Facts) -> Value | None:
            x, y = a(values, facts), b(values, facts)
            if not isinstance(x, (int, float)) or not isinstance(y, (int, float)):
                return None
            return calculate(x, y)

        spelling = f"({left.spelling} {type(node.op).__name__} {right.spelling})"
        return _Term(both or InputType.NUMBER, evaluate, spelling)

    def _choice(self, node: ast.IfExp) -> _Term:
        test, then, other = self._truth(node.test), self._term(node.body), self._term(node.orelse)
        kind = then.type
        if then.type != other.type:
            if then.type not in _NUMERIC or other.type not in _NUMERIC:
                raise self._error("both sides of if … else must have one type")
            kind = InputType.NUMBER
        condition, a, b = test.evaluate, then.evaluate, other.evaluate
        return _Term(
            kind,
            lambda v, f: a(v, f) if condition(v, f) else b(v, f),
            f"({then.spelling} if {test.spelling} else {other.spelling})",
        )


def _comparable(left: InputType, right: InputType, ordered: bool) -> bool:
    if left in _NUMERIC and right in _NUMERIC:
        return True
    return not ordered and left == right and left in (InputType.TEXT, InputType.FLAG)
