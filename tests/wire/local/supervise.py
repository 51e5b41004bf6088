# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A supervisor in a process of its own, to be killed: prints the pids of its nodes, then waits.

python supervise.py BASE [MODULE that the fork server imports]
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from light_nodes import serve_light
from standin_nodes import plans

from kubediffusion.cli.shell import run_async
from kubediffusion.local.folders import RunFolder
from kubediffusion.local.process import warm_up
from kubediffusion.local.supervisor import Supervisor


async def main(base: Path) -> None:
    folder = RunFolder(base)
    supervisor = Supervisor(plans("vae", "transformer"), folder, serve=serve_light)
    supervisor.start()
    print("started", flush=True)
    try:
        await supervisor.wait_ready()
        # A node holds tensors in shared memory while it lives.
        (folder.shm / "tensor").write_bytes(bytes(1024))
        print(folder.path, *(report.pid for report in supervisor.reports()), flush=True)
        await asyncio.Event().wait()
    finally:
        await supervisor.stop()
        folder.close()


if __name__ == "__main__":
    warm_up(sys.argv[2:])
    try:
        run_async(main(Path(sys.argv[1])))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
