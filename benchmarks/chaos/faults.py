# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What goes wrong, and when: drawn from a seed, done to real processes."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.chaos.fleet import DEAD, Fleet, Node

KINDS = ("kill", "pause", "slow", "cut")
# A node runs so long, and is stopped so long, while it is slow: a third of its speed.
_RUN, _STOP = 0.02, 0.04


@dataclass(frozen=True)
class Fault:
    at: float
    kind: str
    node: int
    seconds: float


def schedule(seconds: float, nodes: int, mean_gap: float, seed: int) -> list[Fault]:
    """Faults of nodes, a Poisson stream of them, none in the last tenth. Some last longer than it
    takes to be given up for dead, and some not."""
    draw = random.Random(seed)
    faults: list[Fault] = []
    now = draw.expovariate(1 / mean_gap)
    while now < 0.9 * seconds:
        kind = draw.choice(KINDS)
        faults.append(Fault(now, kind, draw.randrange(nodes), draw.uniform(0.2, 2 * DEAD)))
        now += draw.expovariate(1 / mean_gap)
    return faults


class Chaos:
    """Carries a schedule out. One fault at a time happens to a node; the others are skipped."""

    def __init__(self, fleet: Fleet, faults: Sequence[Fault], gateways_at: Sequence[float]) -> None:
        self.happened: Counter[str] = Counter()
        self._fleet = fleet
        self._faults = faults
        self._gateways_at = gateways_at
        self._busy: set[int] = set()

    async def run(self) -> None:
        """Returns when all is mended."""
        async with asyncio.TaskGroup() as group:
            for number, at in enumerate(self._gateways_at):
                group.create_task(self._kill_gateway(number % len(self._fleet.gateways), at))
            for fault in self._faults:
                group.create_task(self._happen(fault))

    async def _happen(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at)
        if fault.node in self._busy:
            return
        self._busy.add(fault.node)
        try:
            node = self._fleet.nodes[fault.node]
            await getattr(self, f"_{fault.kind}")(node, fault.seconds)
            self.happened[fault.kind] += 1
        finally:
            self._busy.discard(fault.node)

    async def _kill(self, node: Node, seconds: float) -> None:
        await node.process.kill()
        await asyncio.sleep(seconds / 4)
        await node.process.start()

    async def _pause(self, node: Node, seconds: float) -> None:
        node.process.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            node.process.signal(signal.SIGCONT)

    async def _slow(self, node: Node, seconds: float) -> None:
        for _ in range(int(seconds / (_RUN + _STOP))):
            await self._pause(node, _STOP)
            await asyncio.sleep(_RUN)

    async def _cut(self, node: Node, seconds: float) -> None:
        node.relay.cut()
        try:
            await asyncio.sleep(seconds)
        finally:
            node.relay.mend()

    async def _kill_gateway(self, number: int, at: float) -> None:
        await asyncio.sleep(at)
        gateway = self._fleet.gateways[number]
        await gateway.kill()
        await asyncio.sleep(1.0)
        await gateway.start()
        self.happened["gateway killed"] += 1
