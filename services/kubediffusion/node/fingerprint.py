# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What has to be equal for two nodes to compute equal bits."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def fingerprint(device: str, threads: int) -> str:
    """One line of ``key=value`` parts. A model's dtype is in its identity and not in here."""
    parts = [f"device={_device(device)}", f"threads={threads}"]
    parts += [f"{name}={_version(name)}" for name in _LIBRARIES]
    return ";".join(parts)


def _device(device: str) -> str:
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}/sm{major}{minor}/cuda{torch.version.cuda}"
    # torch chooses kernels by the instruction set, and the BLAS below it by the CPU.
    return f"{_cpu_model()}/{torch.backends.cpu.get_cpu_capability()}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip().replace(";", ",")
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
