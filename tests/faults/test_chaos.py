# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The short form of `python -m benchmarks.chaos`: every fault there is, for some seconds."""

from __future__ import annotations

import asyncio

from benchmarks.chaos.__main__ import Asked, chaos
from benchmarks.chaos.faults import KINDS, schedule
from benchmarks.chaos.fleet import Fleet, workflow_of
from benchmarks.chaos.load import Load


async def test_no_accepted_request_is_lost_late_or_wrong() -> None:
    asked = Asked(requests=150, seconds=15.0, seed=5, gap=0.8, deadline=90.0, pictures=8)
    outcome = await chaos(asked)
    assert outcome.tally.wrong == []
    assert outcome.tally.done == asked.requests
    assert outcome.left == 0
    # All of it happened, and hit requests at work: the test tests something.
    assert outcome.faults["gateway killed"] == 2
    assert set(KINDS) <= set(outcome.faults)
    assert outcome.tally.resumed + outcome.tally.sent_again > 0
    assert min(outcome.tally.jobs, outcome.tally.streams) > 20


async def test_a_picture_that_is_not_the_right_one_is_told(tmp_path) -> None:
    async with Fleet(workflow_of("standin", 0.001), tmp_path) as fleet:
        load = Load("standin", {"prompt": "a", "steps": 4}, fleet.doors, deadline=60.0)
        try:
            async with asyncio.timeout(120):
                await load.undisturbed(2)
                load._right[0], load._right[1] = load._right[1], load._right[0]
                await load.run(6, 0.1, seed=1)
        finally:
            await load.close()
    assert len(load.tally.wrong) == 6


def test_the_same_seed_gives_the_same_faults() -> None:
    assert schedule(60, 6, 2.0, seed=3) == schedule(60, 6, 2.0, seed=3)
    assert schedule(60, 6, 2.0, seed=3) != schedule(60, 6, 2.0, seed=4)
