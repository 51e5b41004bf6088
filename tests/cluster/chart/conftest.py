# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Helm against the real API server, in a namespace that enforces the restricted level."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.kube import ControlPlane, Kube, Object
from tests.unit.chart.conftest import program
from tests.unit.chart.rendering import CHART, Helm

RESTRICTED = {
    f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")
}


@dataclass(frozen=True)
class Release:
    """The release ``kd`` in a test's namespace."""

    helm: Helm
    environment: dict[str, str]
    namespace: str

    def __call__(self, *arguments: str | Path, values: Any = None) -> str:
        """`helm ARGUMENTS`. Raises HelmError."""
        flags: list[str | Path] = ["--namespace", self.namespace]
        stdin = ""
        if isinstance(values, Path):
            flags += ["--values", values]
        elif values is not None:
            stdin = yaml.safe_dump(values)
            flags += ["--values", "-"]
        return self.helm(*arguments, *flags, stdin=stdin, **self.environment)

    def install(self, values: Any = None, *flags: str) -> str:
        return self("install", "kd", CHART, *flags, values=values)

    def upgrade(self, values: Any = None, *flags: str) -> str:
        return self("upgrade", "kd", CHART, *flags, values=values)

    def uninstall(self) -> str:
        return self("uninstall", "kd", "--wait", "--timeout", "60s")

    def objects(self) -> list[Object]:
        """What Helm says that it made."""
        return [each for each in yaml.safe_load_all(self("get", "manifest", "kd")) if each]


@pytest.fixture
def restricted(admin: Kube, namespace: str) -> str:
    """The test's namespace, made to enforce the restricted Pod Security level."""
    admin.patch("Namespace", namespace, {"metadata": {"labels": RESTRICTED}})
    return namespace


@pytest.fixture(scope="session")
def helm() -> Helm:
    return Helm(program("helm"))


@pytest.fixture
def release(
    helm: Helm, control_plane: ControlPlane, crds: list[str], restricted: str
) -> Iterator[Release]:
    """Not installed yet; what a test leaves outside of its namespace is removed after it."""
    release = Release(helm, control_plane.environment(), restricted)
    yield release
    helm("uninstall", "kd", "--namespace", restricted, "--ignore-not-found", **release.environment)


Can = Callable[[str], set[tuple[str, str, str]]]
