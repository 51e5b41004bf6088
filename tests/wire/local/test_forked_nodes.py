# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a node's process does not take over from the fork server it comes from."""

from __future__ import annotations

import asyncio
import gc
import signal
from pathlib import Path

from kubediffusion.local.process import NodeProcess
from kubediffusion.node import NodeConfig


def tell(config: NodeConfig) -> None:
    print(gc.isenabled(), signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)


async def test_a_node_collects_garbage_and_can_be_stopped_though_its_server_does_neither(
    fork_server: None, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    config = NodeConfig(node_id="n1", address=f"unix:{tmp_path}/n1.sock")
    process = await NodeProcess.start(config, log, tmp_path / "run", tell)
    async with asyncio.timeout(240):
        assert await process.wait() == 0
    assert log.read_text().split() == ["True", "True"]
