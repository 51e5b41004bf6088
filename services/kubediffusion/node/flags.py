# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The flags of `kubediffusion-node`; each has an environment variable of its name."""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from kubediffusion.node.config import NodeConfig

T = TypeVar("T")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{letter}i": 2 ** (10 * n) for n, letter in enumerate("KMGT", start=1)}


def parse(
    arguments: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> NodeConfig:
    """Flags win over the environment. Exits with a message where one is wrong."""
    parser = _parser(os.environ if environ is None else environ)
    return NodeConfig(**vars(parser.parse_args(arguments)))


def size(text: str) -> int:
    """Bytes of a quantity as Kubernetes writes it: 512Mi, 8G, 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]i?|)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or 512Mi, or 8G")
    return int(float(match[1]) * _UNITS[match[2]])


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no", ""):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _at_least(least: float, kind: Callable[[str], T]) -> Callable[[str], T]:
    def convert(text: str) -> T:
        value = kind(text)
        if value < least:  # type: ignore[operator]
            raise argparse.ArgumentTypeError(f"{text} is less than {least:g}")
        return value

    convert.__name__ = kind.__name__
    return convert


def _parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kubediffusion-node",
        description="A model node: hosts models on one device and serves their stages by gRPC.",
        epilog="Each flag can be set by an environment variable: --node-id by "
        "KUBEDIFFUSION_NODE_ID, and so on. What the node hosts is told by its planner "
        "(SetResidency), or by --residency.",
    )

    def add(name: str, convert: Callable[[str], object], default: object, text: str) -> None:
        variable = "KUBEDIFFUSION_" + name.upper().replace("-", "_")
        # A text default is converted by argparse, so a bad variable is told like a bad flag.
        value = environ.get(variable, default)
        shown = "" if default in (None, "") else f" (default: {default})"
        meta = name.rpartition("-")[2].upper()
        parser.add_argument(
            f"--{name}", type=convert, default=value, metavar=meta, help=text + shown
        )

    plain = NodeConfig(node_id="")
    add("node-id", str, socket.gethostname(), "a name that is unique among the nodes")
    add("address", str, "0.0.0.0:7070", 'where to listen: "host:port" or "unix:/path"')
    add("advertise", str, "", "what others dial, where it differs from --address")
    add("device", str, plain.device, "cpu, cuda, or cuda:N")
    add("memory-limit", size, "0", "what models may take together, such as 24Gi; 0: no limit")
    add("tensor-budget", size, "2Gi", "what tensors kept for requests may take together")
    add("metrics-port", _at_least(0, int), None, "serve Prometheus metrics here; 0: a free port")
    add("metrics-host", str, plain.metrics_host, "the address for metrics")
    add("shm-dir", Path, None, "share tensors with other nodes of this machine in this folder")
    add(
        "drain-seconds",
        _at_least(0, float),
        plain.drain_seconds,
        "serve tensors so long after SIGTERM",
    )
    add(
        "threads",
        _at_least(1, int),
        None,
        "threads of one operator; OMP_NUM_THREADS, else 1 on up to two CPUs, else half of them",
    )
    add("announce-path", Path, None, 'write {"address", "metrics", "pid"} here once listening')
    add("residency", Path, None, "a plan to begin with: a SetResidencyRequest as JSON")
    add("exit-with-parent", _boolean, False, "true: exit when the parent process is gone")
    add("max-tasks", _at_least(1, int), plain.max_tasks, "tasks that may be here at once")
    add("max-batch", _at_least(1, int), plain.max_batch, "leases that may share a forward")
    add("log-level", str.upper, plain.log_level, "DEBUG, INFO, WARNING or ERROR")
    add("log-json", _boolean, False, "true: one JSON object a line")
    return parser
