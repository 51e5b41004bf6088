# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""YAML text to checked resources, with every problem named by path and line at once."""

from __future__ import annotations

import difflib
import json
import posixpath
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kubediffusion.api.types import Resource, Source
from kubediffusion.api.workflow import DiffusionWorkflow
from kubediffusion.errors import InvalidWorkflow

MAX_BYTES = 1 << 20  # etcd takes no larger object either
MAX_NODES = 50_000  # what aliases expand to is counted too
MAX_DEPTH = 64
MAX_PROBLEMS = 20

Path = tuple[str | int, ...]
R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    path: Path
    message: str
    line: int | None = None


def load_workflow(text: str | bytes, source: str = "", base: str = "") -> DiffusionWorkflow:
    """The one DiffusionWorkflow in `text`.

    `source` names the text in messages. `base` is the folder that relative ``file://`` sources are
    relative to; without it they stay as written. Raises InvalidWorkflow, whose `field` is the path
    of the first problem and whose message lists all of them.
    """
    workflow = load(DiffusionWorkflow, text, source)
    return _rebased(workflow, base) if base else workflow


def load(kind: type[R], text: str | bytes, source: str = "") -> R:
    """The one resource of type `kind` in `text`. Raises InvalidWorkflow."""
    document = _Document.parse(text, source)
    problems = document.problems
    resource: R | None = None
    if not problems:
        try:
            resource = kind.model_validate_json(json.dumps(document.data))
            problems = [*broken_rules(resource)]
        except ValidationError as error:
            problems = [_problem(kind, details) for details in error.errors(include_url=False)]
    if problems or resource is None:
        raise _invalid(problems, document, source)
    return resource


def broken_rules(resource: BaseModel, path: Path = ()) -> Iterable[Problem]:
    """The rules between fields that do not hold, in the resource and all that it contains."""
    if isinstance(resource, Resource):
        for rule in resource.rules:
            if not rule.holds(resource):
                yield Problem((*path, rule.field), rule.message)
    for name, info in type(resource).model_fields.items():
        here = (*path, info.alias or name)
        value: object = getattr(resource, name)
        if isinstance(value, BaseModel):
            yield from broken_rules(value, here)
        elif isinstance(value, Mapping):
            for key, item in cast(Mapping[str, object], value).items():
                if isinstance(item, BaseModel):
                    yield from broken_rules(item, (*here, key))
        elif isinstance(value, tuple):
            for index, item in enumerate(cast(tuple[object, ...], value)):
                if isinstance(item, BaseModel):
                    yield from broken_rules(item, (*here, index))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the likeliest, else all that are known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or [
        k for k in known if k.lower() == name.lower()
    ]
    if close:
        return f"did you mean {close[0]}?"
    return f"known are {', '.join(known)}" if known else "none are known here"


def format_path(path: Path) -> str:
    """``spec.controlNets[0].source.uri``"""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


# ---------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """Safe, and without dates: a date is text, as it is in JSON."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass
class _Document:
    data: object = None
    lines: dict[Path, int] = field(default_factory=dict[Path, int])
    problems: list[Problem] = field(default_factory=list[Problem])

    @classmethod
    def parse(cls, text: str | bytes, source: str) -> _Document:
        document = cls()
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _bad_text(f"not UTF-8 text (byte {error.start})", source) from None
        if len(text) > MAX_BYTES:
            raise _bad_text(f"{len(text)} characters; at most {MAX_BYTES} are taken", source)
        try:
            loader = _Loader(text)
            try:
                root = loader.get_single_node()
                if root is None:
                    raise _bad_text("empty; a DiffusionWorkflow document is expected", source)
                document._walk(root, (), [0])
                if not document.problems:
                    document.data = cast(object, loader.construct_document(root))  # pyright: ignore[reportUnknownMemberType]
            finally:
                loader.dispose()
        except yaml.YAMLError as error:
            raise _bad_text(_yaml_message(error), source) from None
        except (ValueError, RecursionError) as error:
            raise _bad_text(f"not valid YAML: {error}", source) from None
        if not document.problems and not isinstance(document.data, dict):
            raise _bad_text("a mapping is expected at the top: apiVersion, kind, …", source)
        return document

    def _walk(self, node: yaml.Node, path: Path, count: list[int]) -> None:
        """Notes lines; finds doubled keys, nulls, and more nodes than a file can need."""
        count[0] += 1
        if count[0] > MAX_NODES or len(path) > MAX_DEPTH:
            raise ValueError(f"more than {MAX_NODES} values, or nested deeper than {MAX_DEPTH}")
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._walk(item, (*path, index), count)
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                here = (*path, str(key.value))
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                    self.problems.append(Problem(path, "keys must be plain text", line))
                elif key.value in seen:
                    self.problems.append(Problem(here, "is given twice; keep one", line))
                seen.add(str(key.value))
                self._walk(value, here, count)
                self.lines[here] = line
        elif node.tag == "tag:yaml.org,2002:null" and "podTemplate" not in path:
            self.problems.append(Problem(path, "has no value; give one, or leave the field out"))


def _yaml_message(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        if "single document" in str(error.context):
            return "more than one document (---); give each workflow a file of its own"
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        return f"not valid YAML: {error.problem or error.context}{where}"
    return f"not valid YAML: {error}"


# ---------------------------------------------------------------- problems


def _bad_text(message: str, source: str) -> InvalidWorkflow:
    return InvalidWorkflow(f"{source}: {message}" if source else message)


def _invalid(problems: Sequence[Problem], document: _Document, source: str) -> InvalidWorkflow:
    def text(problem: Problem) -> str:
        path, line = problem.path, problem.line
        while line is None and path:
            line, path = document.lines.get(path), path[:-1]
        where = ", ".join(filter(None, (source, f"line {line}" if line else "")))
        return f"{problem.message} ({where})" if where else problem.message

    lines = [text(problems[0])]
    lines += [f"{format_path(p.path)}: {text(p)}" for p in problems[1:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"and {len(problems) - MAX_PROBLEMS} more")
    return InvalidWorkflow("\n".join(lines), field=format_path(problems[0].path))


def _problem(kind: type[BaseModel], error: ErrorDetails) -> Problem:
    """A pydantic error in words that say what to write."""
    path: Path = tuple(part for part in error["loc"] if part != "[key]")
    context: Mapping[str, Any] = error.get("ctx", {})
    given: Any = error.get("input")
    match error["type"]:
        case "extra_forbidden":
            known = _fields_at(kind, path[:-1])
            return Problem(path, f"unknown field; {did_you_mean(str(path[-1]), known)}")
        case "missing":
            return Problem(path, "is required")
        case "literal_error":
            expected = str(context.get("expected", "")).replace("'", "").replace(" or ", ", ")
            hint = did_you_mean(str(given), expected.split(", "))
            return Problem(path, f"{given!r} is not known here; {hint}")
        case "string_type" if isinstance(given, (int, float)) and not isinstance(given, bool):
            return Problem(path, f'must be text; put it in quotes: "{given}"')
        case "string_pattern_mismatch":
            return Problem(path, f"{given!r} does not match {context.get('pattern')}")
        case _:
            message = error["msg"]
            message = message.replace("Input should be", "must be").replace("String", "text")
            return Problem(path, message[:1].lower() + message[1:])


def _fields_at(kind: Any, path: Path) -> list[str]:
    """The field names that a resource of type `kind` takes at `path`."""
    for part in path:
        kind = _child(kind, part)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [info.alias or name for name, info in kind.model_fields.items()]
    return []


def _child(kind: Any, part: str | int) -> Any:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, info in kind.model_fields.items():
            if part == (info.alias or name):
                return bare_type(info.annotation)
        return None
    arguments = typing.get_args(kind)
    if not arguments:
        return None
    return bare_type(arguments[0] if isinstance(part, int) else arguments[-1])


def bare_type(annotation: Any) -> Any:
    """Without Annotated and without None."""
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return bare_type(next(a for a in typing.get_args(annotation) if a is not types.NoneType))
    return annotation


# ---------------------------------------------------------------- relative files


def _rebased(workflow: DiffusionWorkflow, base: str) -> DiffusionWorkflow:
    return cast(DiffusionWorkflow, _rebase(workflow, base))


def _rebase(value: object, base: str) -> object:
    if isinstance(value, Source) and value.uri.startswith("file://"):
        path = value.uri.removeprefix("file://")
        absolute = posixpath.normpath(posixpath.join(base, path))
        return value.model_copy(update={"uri": f"file://{absolute}"})
    if isinstance(value, BaseModel):
        changed = {name: _rebase(getattr(value, name), base) for name in value.model_fields_set}
        return value.model_copy(update=changed)
    if isinstance(value, tuple):
        return tuple(_rebase(item, base) for item in cast(tuple[object, ...], value))
    if isinstance(value, dict):
        return {k: _rebase(v, base) for k, v in cast(dict[str, object], value).items()}
    return value
