# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A model node: the process that hosts models on one device and runs their stages.

    core.Node        one event loop: takes tasks, fetches their inputs, reports, drains
    device.Device    one thread that owns the device: one one-shot task or one step at a time
    residency        which models are here: downloads, loads, evicts as the planner says
    service          the gRPC face; `session` and `outbox` are one gateway's Work stream
    server           the parts put together; `process` is the process around it

Importing this package costs nothing: torch and grpc come with `run`, so that a supervisor can
start nodes without them.
"""

from kubediffusion.node.config import NodeConfig


def run(config: NodeConfig) -> None:
    """Serves until told to stop. Blocking; exits the process with a code other than 0 on failure.

    A target for `multiprocessing` with the "spawn" or "forkserver" method.
    """
    from kubediffusion.node.process import run_process

    run_process(config)


def main() -> None:
    """The console script `kubediffusion-node`."""
    from kubediffusion.node.flags import parse

    run(parse())


__all__ = ["NodeConfig", "main", "run"]
