# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A node between a gateway and an operator that are a version ahead of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from puppets import MODELS, Rig

from kubediffusion.errors import InvalidInput
from kubediffusion.node.server import read_plan
from kubediffusion.v1alpha1 import node_pb2

M = TypeVar("M", bound=Message)
# Field 1007 of any message, a text.
LATER = bytes([0xFA, 0x3E, 0x02]) + b"hi"


def newer(message: M) -> M:
    """With a field that only a later version has."""
    found = type(message).FromString(message.SerializeToString() + LATER)
    assert found.SerializeToString().endswith(LATER)
    return found


async def test_what_only_a_newer_gateway_says_changes_nothing(rig: Rig) -> None:
    gateway = await rig.gateway()
    await gateway.call.write(newer(node_pb2.WorkRequest()))  # of a kind that nobody knows here
    key = node_pb2.TaskKey(request_id="r1", task="encode", epoch=1)
    assign = node_pb2.Assign(key=newer(key), model="enc", stage="encode", outputs=["embeds"])
    await gateway.send(assign=newer(assign))
    done = await gateway.event("done", "r1")
    assert done.outputs["embeds"].tensor.nbytes
    await gateway.send(renew=newer(node_pb2.Renew(needed_models=["dit"])))
    await gateway.send(release=newer(node_pb2.Release(request_ids=["r1"])))
    await gateway.load(lambda load: not load.tensors and not load.running)
    assert (await rig.statuses())["dit"].needed_by == 1


async def test_what_only_a_newer_planner_says_changes_nothing(rig: Rig) -> None:
    answer = await rig.plan(2, [newer(spec) for spec in MODELS])
    assert answer.generation == 2
    assert set(await rig.settled()) == {"enc", "dit", "vae"}


def test_a_plan_file_of_a_newer_operator_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The ConfigMap changes under pods of the version before, and one of them starts again."""
    plan: dict[str, Any] = json_format.MessageToDict(
        node_pb2.SetResidencyRequest(generation=3, planner="operator", models=MODELS)
    )
    plan["fromTheFuture"] = 1
    plan["models"][0]["fromTheFuture"] = {"a": ["b"]}
    path = tmp_path / "residency.json"
    path.write_text(json.dumps(plan))
    found = read_plan(path)
    assert [spec.identity for spec in found.models] == ["enc", "dit", "vae"]
    assert found.generation == 3
    (said,) = caplog.messages
    assert "fromTheFuture" in said
    path.write_text(json.dumps({**plan, "models": 7}))
    with pytest.raises(InvalidInput, match=r"residency\.json"):
        read_plan(path)
