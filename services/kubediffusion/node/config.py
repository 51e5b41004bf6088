# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a node is told at its start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class NodeConfig:
    """One node process. Sizes are bytes, times seconds."""

    node_id: str
    # Where to listen: "host:port" (port 0 takes a free one) or "unix:/path".
    address: str = "127.0.0.1:0"
    # What other processes dial, where that differs (a pod listens on 0.0.0.0).
    advertise: str = ""
    # "cpu", "cuda", "cuda:1".
    device: str = "cpu"
    # What the models may take together; 0: no limit.
    memory_limit: int = 0
    # What the tensors kept for requests may take together.
    tensor_budget: int = 2 * GIB
    # Prometheus; None: not served. Port 0 takes a free one.
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    # The folder that the processes of this machine share tensors in; None: by gRPC alone.
    shm_dir: Path | None = None
    # How long a draining node goes on serving its tensors.
    drain_seconds: float = 120.0
    # None: `OMP_NUM_THREADS`, or what `default_threads` says.
    threads: int | None = None
    # A JSON file {"address", "metrics", "pid"}, written once the node listens.
    announce_path: Path | None = None
    # A plan to begin with: a SetResidencyRequest in protobuf's JSON.
    residency: Path | None = None
    # Exit when the process that started this one is gone.
    exit_with_parent: bool = False
    # Exit once every planned model has failed for good: whoever started this one tries again later.
    exit_on_failure: bool = False
    # Why a failing node ended goes there, if the file is there: Kubernetes shows it with the pod.
    termination_log: Path = Path("/dev/termination-log")
    # Tasks that may be here at once; more are declined.
    max_tasks: int = 256
    # Leases that may share a forward in ``numerics: fast``.
    max_batch: int = 8
    # What compiled blocks are kept in from one start to the next; None: a folder of the user's own.
    compile_cache: Path | None = None
    log_level: str = "INFO"
    log_json: bool = False


def thread_count(config: NodeConfig, environ: Mapping[str, str] | None = None) -> int:
    """Threads of one operator: the config's, or OMP_NUM_THREADS, or a careful default."""
    if config.threads is not None:
        return max(1, config.threads)
    environ = os.environ if environ is None else environ
    try:
        return max(1, int(environ["OMP_NUM_THREADS"].split(",")[0]))
    except (KeyError, ValueError):
        return default_threads(config.device, len(os.sched_getaffinity(0)))


def compile_cache(config: NodeConfig, environ: Mapping[str, str] | None = None) -> Path:
    """The config's folder, or one in the user's cache."""
    if config.compile_cache is not None:
        return config.compile_cache
    environ = os.environ if environ is None else environ
    own = environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else Path.home() / ".cache") / "kubediffusion" / "compiled"


def default_threads(device: str, cpus: int) -> int:
    """1 on an accelerator and on up to two CPUs, else half of the CPUs that we may use.

    Half, because two of them are usually one core; one on a small machine, because nodes share it,
    and OpenMP teams that wait for each other there were measured 6 to 15 times slower.
    """
    return 1 if device != "cpu" or cpus <= 2 else cpus // 2
