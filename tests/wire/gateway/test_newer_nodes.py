# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A gateway over nodes that are a version ahead of it."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from fake_nodes import FakeNode
from google.protobuf.message import Message
from one_image import assert_image, fleet_of, run_one

from kubediffusion.v1alpha1 import node_pb2

M = TypeVar("M", bound=Message)
# Field 1007 of any message, a text.
LATER = bytes([0xFA, 0x3E, 0x02]) + b"hi"


def newer(message: M) -> M:
    """With a field that only a later version has."""
    return type(message).FromString(message.SerializeToString() + LATER)


class NewerNode(FakeNode):
    """Says more than this version knows, in every answer and beside them."""

    def describe(self) -> node_pb2.DescribeResponse:
        said = super().describe()
        models = [newer(status) for status in said.models]
        # A model in a state that nobody knows here is one that is not there.
        models.append(newer(node_pb2.ModelStatus(identity="odd", state=99)))  # pyright: ignore[reportArgumentType]
        del said.models[:]
        said.models.extend(models)
        return newer(said)

    def load(self, **fields: object) -> node_pb2.LoadReport:
        return newer(super().load(**fields))

    async def _ask(self, assign, step, out) -> None:
        out.put_nowait(newer(node_pb2.WorkEvent()))  # of a kind that nobody knows here
        out.put_nowait(node_pb2.WorkEvent(load=self.load()))
        await super()._ask(assign, step, out)


async def test_what_only_a_newer_node_says_changes_nothing(tmp_path: Path) -> None:
    async with fleet_of([NewerNode(tmp_path, "a")]) as fleet:
        assert fleet.missing(["odd", "dit"]) == ("odd",)
        _, outcome = await run_one(fleet)
        assert_image(outcome)
        assert not outcome.of("resumed")
