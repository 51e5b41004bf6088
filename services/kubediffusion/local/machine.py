# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What this machine has, as far as this process may use it: affinity and cgroup limits count."""

from __future__ import annotations

import math
import os
from pathlib import Path

from kubediffusion.local.plan import Machine, parse_threads

_CGROUP = Path("/sys/fs/cgroup")


def this_machine(cgroup: Path = _CGROUP) -> Machine:
    """Raises InvalidInput where OMP_NUM_THREADS is no number."""
    return Machine(
        cpus=_cpus(cgroup),
        memory=_memory(cgroup),
        threads=parse_threads(os.environ.get("OMP_NUM_THREADS")),
    )


def _cpus(cgroup: Path) -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cpus = min(cpus, math.ceil(int(quota) / int(period)))
    return max(1, cpus)


def _memory(cgroup: Path) -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read(cgroup / "memory.max")
    return min(memory, int(limit)) if limit.isdigit() else memory


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
