# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The wire only grows: what a program of the version before sends means the same here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kubediffusion.v1alpha1 import gateway_pb2, node_pb2, tensor_pb2

KNOWN = Path(__file__).with_name("wire.txt")


def wire() -> Iterator[str]:
    """Fields, enum values and calls, as far as bytes depend on them: a line each."""
    for module in (tensor_pb2, node_pb2, gateway_pb2):
        file: Any = module.DESCRIPTOR
        for message in file.message_types_by_name.values():
            yield from _message(message, message.name)
        for enum in file.enum_types_by_name.values():
            yield from _enum(enum, enum.name)
        for service in file.services_by_name.values():
            for call in service.methods:
                ways = [
                    ("stream " if streams else "") + kind.name
                    for streams, kind in (
                        (call.client_streaming, call.input_type),
                        (call.server_streaming, call.output_type),
                    )
                ]
                yield f"{service.name}/{call.name}: {ways[0]} -> {ways[1]}"


def _message(message: Any, path: str) -> Iterator[str]:
    for field in message.fields:
        of = field.message_type or field.enum_type
        kind = of.name if of is not None else f"type {field.type}"
        many = "repeated " if field.is_repeated else ""
        oneof = field.containing_oneof
        within = "" if oneof is None or oneof.name.startswith("_") else f" in {oneof.name}"
        yield f"{path} {field.number}: {many}{kind} {field.name}{within}"
    for nested in message.nested_types:
        yield from _message(nested, f"{path}.{nested.name}")
    for enum in message.enum_types:
        yield from _enum(enum, f"{path}.{enum.name}")


def _enum(enum: Any, path: str) -> Iterator[str]:
    for value in enum.values:
        yield f"{path} = {value.number}: {value.name}"


def test_nothing_that_was_on_the_wire_has_changed() -> None:
    """A line that is missing breaks those who are one version behind: take another number."""
    known, now = KNOWN.read_text().splitlines(), list(wire())
    assert sorted(set(known) - set(now)) == []
    assert sorted(set(now) - set(known)) == [], f"new: write these lines into {KNOWN.name}"
