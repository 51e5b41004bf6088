# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Warming up is a head start, and nothing that can fail."""

from __future__ import annotations

import atexit

import pytest

from kubediffusion.local import process


def test_a_fork_server_that_cannot_start_is_told_by_the_first_node_and_not_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def ensure_running() -> None:
        asked.append("start")
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(process.forkserver, "ensure_running", ensure_running)
    monkeypatch.setattr(process._context, "set_forkserver_preload", asked.append)
    monkeypatch.setattr(atexit, "register", lambda function: None)
    process.warm_up(["json"])
    preloaded, started = asked
    assert isinstance(preloaded, list)
    assert "json" in preloaded
    assert started == "start"
