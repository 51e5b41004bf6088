# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A run's private files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kubediffusion.errors import Unavailable
from kubediffusion.local.folders import RunFolder, RunState, running, runtime_base


def test_folders_are_for_their_owner_alone(run_base: Path) -> None:
    folder = RunFolder(run_base / "own")
    assert [path.stat().st_mode & 0o777 for path in (folder.base, folder.path, folder.shm)] == [
        0o700
    ] * 3
    folder.close()
    assert not folder.path.exists()
    assert not folder.shm.exists()


def test_a_folder_that_others_can_open_is_refused(run_base: Path) -> None:
    base = run_base / "shared"
    base.mkdir()
    base.chmod(0o755)
    with pytest.raises(Unavailable, match="only you can open"):
        RunFolder(base)


def test_a_link_in_the_place_of_the_folder_is_refused(run_base: Path) -> None:
    (run_base / "link").symlink_to(run_base)
    with pytest.raises(Unavailable, match="only you can open"):
        RunFolder(run_base / "link")


def test_socket_paths_fit_however_long_the_runtime_folder_is(
    run_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = run_base / ("x" * 90)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    base = runtime_base()
    socket = base / "run-01234567" / "controlnet-edges-64.sock"
    assert len(os.fsencode(socket)) <= 107


def test_a_live_run_survives_the_sweep_of_another(run_base: Path) -> None:
    first, second = RunFolder(run_base), RunFolder(run_base)
    assert first.path.exists()
    first.publish(RunState(pid=1, grpc="127.0.0.1:1"))
    second.publish(RunState(pid=2, grpc="127.0.0.1:2"))
    assert {state.pid for state in running(run_base)} == {1, 2}
    first.close()
    second.close()


def test_a_state_of_another_version_is_read_as_far_as_it_is_known(run_base: Path) -> None:
    folder = RunFolder(run_base)
    folder.write_json("state.json", {"pid": 3, "grpc": "x", "colour": "red"})
    assert running(run_base) == [RunState(pid=3, grpc="x")]
    (folder.path / "state.json").write_text("{")
    assert running(run_base) == []
    folder.close()
