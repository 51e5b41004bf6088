# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Databases for jobs: SQLite always, and a PostgreSQL server of our own where there is one."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest


def _programs() -> Path | None:
    """The folder of PostgreSQL's programs: on the PATH, or where Debian has them."""
    if (found := shutil.which("initdb")) and shutil.which("postgres"):
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return folders[-1].parent if folders else None


def _as_owner(folder: Path) -> list[str]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return []
    user = pwd.getpwnam("postgres")
    os.chown(folder, user.pw_uid, user.pw_gid)
    return ["runuser", "-u", "postgres", "--"]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A folder with the socket of a PostgreSQL server that ends with the session."""
    programs = _programs()
    driver = importlib.util.find_spec("psycopg") is not None
    if programs is None or not driver:
        lacking = "PostgreSQL (initdb, postgres)" if programs is None else "psycopg"
        message = f"jobs are not tested on PostgreSQL: {lacking} is not installed"
        warnings.warn(message, stacklevel=1)
        pytest.skip(message)
    folder = Path(tempfile.mkdtemp(prefix="kd-pg-"))
    try:
        become = _as_owner(folder)
        data, log = folder / "data", folder / "log"
        initdb = ["initdb", "-D", data, "-U", "jobs", "--auth=trust", "--no-sync", "-E", "UTF8"]
        settings = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        control = [*become, programs / "pg_ctl", "-D", data, "-w", "-l", log]
        subprocess.run([*become, programs / initdb[0], *initdb[1:]], check=True, stdout=-3, cwd="/")
        subprocess.run([*control, "-o", settings, "start"], check=True, stdout=-3, cwd="/")
        try:
            yield str(folder)
        finally:
            subprocess.run([*control, "-m", "fast", "stop"], check=True, stdout=-3, cwd="/")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    folder = request.getfixturevalue("postgres")
    import psycopg

    name = f"jobs_{uuid.uuid4().hex}"
    with psycopg.connect(host=folder, user="jobs", dbname="postgres", autocommit=True) as db:
        db.execute(f'CREATE DATABASE "{name}"')  # type: ignore[arg-type]
    return f"postgresql+psycopg://jobs@/{name}?host={folder}"
