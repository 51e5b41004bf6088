# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""However the supervisor ends, no process, socket or shared memory outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from kubediffusion.local.folders import RunFolder, RunState, running, sweep

SCRIPT = Path(__file__).parent.parent / "wire" / "local" / "supervise.py"
WAIT = 120.0


@dataclass(frozen=True)
class Run:
    process: subprocess.Popen[str]
    folder: Path
    shm: Path
    pids: tuple[int, ...]
    children: tuple[int, ...]


@contextmanager
def supervised(base: Path) -> Iterator[Run]:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(base)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        path, *pids = process.stdout.readline().split()
        folder = Path(path)
        shm = Path("/dev/shm") / f"kubediffusion-{os.getuid()}-{folder.name}"
        children = tuple(_children(process.pid))
        yield Run(process, folder, shm, tuple(map(int, pids)), children)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name
)
def test_nothing_outlives_the_supervisor(run_base: Path, number: signal.Signals) -> None:
    with supervised(run_base) as run:
        assert len(run.pids) == 2
        assert all(_alive(pid) for pid in run.pids)
        assert sorted(path.suffix for path in run.folder.glob("*.sock")) == [".sock", ".sock"]
        run.process.send_signal(number)
        run.process.wait(WAIT)
        # Nodes, fork server and resource tracker.
        for pid in (*run.pids, *run.children):
            _until(lambda pid=pid: not _alive(pid), f"process {pid} is gone")
        _until(lambda: not run.folder.exists() and not run.shm.exists(), "the folders are gone")
    if number is not signal.SIGKILL:
        assert run.process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_stopping_does_not_wait_for_the_fork_servers_imports(
    run_base: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(run_base), "slow_import"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parent)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        children = _children(process.pid)
        process.send_signal(number)
        assert process.wait(WAIT) == 130
        for pid in children:
            _until(lambda pid=pid: not _alive(pid), f"process {pid} is gone")
        assert os.listdir(run_base) == []
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_node_whose_fork_server_dies_is_not_left_alone(run_base: Path) -> None:
    with supervised(run_base) as run:
        server = psutil.Process(run.pids[0]).ppid()
        assert server in run.children
        os.kill(server, signal.SIGKILL)
        for pid in run.pids:
            _until(lambda pid=pid: not _alive(pid), f"process {pid} is gone")
        assert run.folder.exists()
        # A new server is started, and new nodes.
        announcement = run.folder / "vae.json"
        _until(lambda: announcement.exists() and _pid(announcement) not in run.pids, "it is back")


def test_what_a_dead_run_left_is_swept_at_the_next_start(run_base: Path) -> None:
    first = RunFolder(run_base)
    os.close(first._lock)  # as the kernel does when the process ends
    (first.shm / "tensor").touch()
    second = RunFolder(run_base)
    assert not first.path.exists()
    assert not first.shm.exists()
    sweep(run_base)
    assert second.path.exists()
    second.publish(RunState(pid=1, grpc="127.0.0.1:1", workflows=("a", "b")))
    assert running(run_base) == [RunState(pid=1, grpc="127.0.0.1:1", workflows=("a", "b"))]
    second.close()
    assert running(run_base) == []
    assert os.listdir(run_base) == []


def _until(condition: object, what: str) -> None:
    """Other processes' ends cannot be waited for otherwise: they are not our children."""
    ends = time.monotonic() + WAIT
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < ends, f"waited in vain until {what}"
        time.sleep(0.02)


def _pid(announcement: Path) -> int:
    import json

    try:
        return json.loads(announcement.read_text())["pid"]
    except FileNotFoundError:
        return -1


def _children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
