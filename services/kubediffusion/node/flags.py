# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The flags of `kubediffusion-node`; each has an environment variable of its name."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from kubediffusion.flags import Flags, at_least, boolean, log_level, size
from kubediffusion.node.config import NodeConfig


def parse(
    arguments: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> NodeConfig:
    """Flags win over the environment. Exits with a message where one is wrong."""
    return NodeConfig(**_flags(os.environ if environ is None else environ).parse(arguments))


def _flags(environ: Mapping[str, str]) -> Flags:
    flags = Flags(
        "kubediffusion-node",
        "A model node: hosts models on one device and serves their stages by gRPC.",
        "What the node hosts is told by its planner (SetResidency), or by --residency.",
        environ,
    )
    add, plain = flags.add, NodeConfig(node_id="")
    add("node-id", str, socket.gethostname(), "a name that is unique among the nodes")
    add("address", str, "0.0.0.0:7070", 'where to listen: "host:port" or "unix:/path"')
    add("advertise", str, "", "what others dial, where it differs from --address")
    add("device", str, plain.device, "cpu, cuda, or cuda:N")
    add("memory-limit", size, "0", "what models may take together, such as 24Gi; 0: no limit")
    add("tensor-budget", size, "2Gi", "what tensors kept for requests may take together")
    add("metrics-port", at_least(0, int), None, "serve Prometheus metrics here; 0: a free port")
    add("metrics-host", str, plain.metrics_host, "the address for metrics")
    add("shm-dir", Path, None, "share tensors with other nodes of this machine in this folder")
    add(
        "drain-seconds",
        at_least(0, float),
        plain.drain_seconds,
        "serve tensors so long after SIGTERM",
    )
    add(
        "threads",
        at_least(1, int),
        None,
        "threads of one operator; OMP_NUM_THREADS, else 1 on up to two CPUs, else half of them",
    )
    add("announce-path", Path, None, 'write {"address", "metrics", "pid"} here once listening')
    add("residency", Path, None, "a plan to begin with: a SetResidencyRequest as JSON")
    add("exit-with-parent", boolean, False, "true: exit when the parent process is gone")
    add(
        "exit-on-failure",
        boolean,
        False,
        "true: exit with code 3 once every planned model has failed for good",
    )
    add(
        "termination-log",
        Path,
        plain.termination_log,
        "where the last words of a failing node go, if the file is there",
    )
    add("max-tasks", at_least(1, int), plain.max_tasks, "tasks that may be here at once")
    add("max-batch", at_least(1, int), plain.max_batch, "leases that may share a forward")
    add("compile-cache", Path, None, "keep compiled blocks here; ~/.cache/kubediffusion/compiled")
    add("log-level", log_level, plain.log_level, "DEBUG, INFO, WARNING or ERROR")
    add("log-json", boolean, False, "true: one JSON object a line")
    return flags
