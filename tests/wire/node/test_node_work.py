# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A gateway's Work stream: tasks in, events out."""

from __future__ import annotations

import numpy as np
from puppets import Rig

from kubediffusion import tensors
from kubediffusion.v1alpha1 import node_pb2


async def test_a_one_shot_task_is_accepted_and_done_with_the_outputs_asked_for(rig: Rig) -> None:
    gateway = await rig.gateway()
    await gateway.assign("r1", outputs=["embeds", "words"], inputs={"seed": 3})
    done = await gateway.event("done", "r1")
    assert gateway.kinds() == ["welcome", "accepted", "done"]
    assert set(done.outputs) == {"embeds", "words"}
    embeds = done.outputs["embeds"].tensor
    assert tensors.dtype_name(embeds.dtype) == "bfloat16"
    bits = np.frombuffer(embeds.inline, np.uint16)
    assert list(bits.astype(np.uint32) << 16) == list(np.full(4, 3.0, np.float32).view(np.uint32))
    assert tensors.value_of(done.outputs["words"]) == ["a", 1]
    assert done.timing.run_seconds > 0


async def test_a_lease_reports_each_step_and_hands_out_checkpoints(rig: Rig) -> None:
    rig.strings.hold()
    gateway = await rig.gateway()
    await gateway.denoise("r1", every=2, previews=3, inputs={"steps": 4})
    for step in range(1, 5):
        rig.strings.release(1)
        if step < 4:
            progress = await gateway.event("progress", seen=step - 1)
            assert (progress.step, progress.total_steps) == (step, 4)
    done = await gateway.event("done")
    assert done.timing.steps_run == 4
    assert [c.checkpoint.step for c in gateway.all("checkpoint")] == [2]
    assert [p.step for p in gateway.all("preview")] == [3]
    assert all(
        t.HasField("inline") for t in gateway.all("checkpoint")[0].checkpoint.tensors.values()
    )
    assert gateway.all("checkpoint")[0].checkpoint.fingerprint == gateway.node.fingerprint
    assert node_pb2.LoadReport.DESCRIPTOR is not None
