# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What tests of several folders share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, and the same tree gives the same result.
# `pytest --hypothesis-profile=search` looks for what nobody has thought of.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("repeatable")

# Shells start jobs in the background deaf to Ctrl-C, and the processes of tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def fork_server() -> None:
    """Model nodes fork from one process that imported torch and the families: once a session."""
    from kubediffusion.local.process import warm_up
    from kubediffusion.local.runtime import NODE_MODULES

    warm_up(NODE_MODULES)


@pytest.fixture
def run_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for run folders, with a short name, because sockets lie in them."""
    return tmp_path_factory.mktemp("kd")
