# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Many requests wait for a node that takes one at a time: it is asked once, not by each of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from fake_nodes import FakeNode, declined
from gateways import assert_empty, changed, events_of, gateway_over, one_node, request

from kubediffusion.gateway.fullness import PAUSE, Fullness
from kubediffusion.v1alpha1 import node_pb2

WAITING = 40


class OneSlot:
    """A node's script: the first denoiser keeps its slot until `go`, and others are refused."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.began = asyncio.Event()
        self.asked = 0
        self.refused = 0

    def __call__(self, node: FakeNode, assign: node_pb2.Assign, step: int) -> object:
        if assign.stage != "denoise":
            return None
        if step == -1:
            self.asked += 1
            if self.asked > 1 and not self.go.is_set():
                self.refused += 1
                return declined(assign, node_pb2.DECLINE_REASON_QUEUE_FULL)
        if step == 0 and not self.go.is_set():
            self.began.set()
            return self.go.wait()
        return None


async def test_a_full_node_is_asked_once_a_pause_however_many_wait(tmp_path):
    slot = OneSlot()
    node = one_node(tmp_path, script=slot)
    async with gateway_over([node]) as gateway:
        await changed(gateway, lambda: gateway.list_workflows()[0].ready)
        first = asyncio.create_task(events_of(gateway, request(seed=0)))
        await asyncio.wait_for(slot.began.wait(), 60)
        others = [
            asyncio.create_task(events_of(gateway, request(seed=seed)))
            for seed in range(1, WAITING + 1)
        ]
        await node.until(lambda: gateway.fleet.waiting == WAITING and bool(slot.refused))
        since, refused = time.monotonic(), slot.refused
        await node.until(lambda: slot.refused >= refused + 8)
        assert slot.refused - refused <= (time.monotonic() - since) / PAUSE + 2

        # What waits for its turn at a node that is there is queued, and not held.
        gateway.measures.refresh()
        value = gateway.measures.registry.get_sample_value
        for state, count in {"held": 0, "queued": WAITING, "running": 1}.items():
            labels = {"workflow": "sd3", "state": state}
            assert value("kubediffusion_gateway_requests_now", labels) == count
        tasks: Counter[str] = Counter()
        for run in (run for flight in gateway.flights for run in flight.runs):
            tasks.update(state for _, stage, state in run.task_states() if stage == "denoise")
        assert tasks["held"] == 0
        assert tasks["queued"] + tasks["running"] == WAITING + 1
        assert tasks["running"] <= 2  # the one that runs, and the one that asks

        slot.go.set()
        for events in await asyncio.gather(first, *others):
            assert events[-1].WhichOneof("kind") == "finished"
        assert_empty(gateway)


async def test_a_report_of_less_to_do_ends_the_pause(tmp_path):
    full = Fullness()
    full.refused(10.0, 3)
    assert full.until == 10.0 + PAUSE
    assert not full.reported(3)
    assert full.reported(2)
    assert full.until <= 10.0


def test_each_task_that_is_taken_lets_one_more_be_sent_at_a_time():
    full = Fullness()
    full.refused(0.0, 1)
    full.rested()
    full.sent(("r", "a"))
    assert full.until > 1e9  # the answer is awaited
    assert full.taken(("r", "a"))
    for name in "bc":
        assert full.until == 0.0
        full.sent(("r", name))
    assert full.until > 1e9
    assert full.withdrawn(("r", "b"))
    assert full.until == 0.0
    full.refused(5.0, 1)
    assert not full.taken(("r", "c"))  # an answer from before the refusal
    full.rested()
    for number in range(100):
        full.sent(("r", str(number)))
        full.taken(("r", str(number)))
    assert not full.known
