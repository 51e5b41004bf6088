# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One real cluster a session, a namespace a test. Run by `make e2e`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from tests.cluster.kube import Kube, NoPrograms
from tests.e2e.cluster import Cluster, node_template, why_not
from tests.e2e.figures import Figures
from tests.e2e.release import RESTRICTED, Release

FIGURES = pytest.StashKey[Figures]()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One node, our images loaded, DNS. Ends with a check that nothing of it is left."""
    if reason := why_not():
        pytest.skip(f"NO END-TO-END TESTS: this machine cannot run containers: {reason}")
    cluster = Cluster()
    try:
        cluster.up()
        yield cluster
    except NoPrograms as error:
        if os.environ.get("CI"):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(f"NO END-TO-END TESTS: {error}")
    finally:
        cluster.down()
    cluster.check()


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A fresh namespace that enforces the restricted level; deleted after the test, unwaited."""
    name = f"e2e-{secrets.token_hex(3)}"
    meta = {"name": name, "labels": RESTRICTED}
    cluster.kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
    cluster.kube.wait_for("ServiceAccount", "default", namespace=name)
    yield name
    cluster.kube.delete("Namespace", name, missing_ok=True)


@pytest.fixture
def kube(cluster: Cluster, namespace: str) -> Kube:
    """The cluster's administrator, in the test's own namespace."""
    return cluster.kube.within(namespace)


@pytest.fixture
def environment(cluster: Cluster, namespace: str) -> dict:
    """A podTemplate whose claim gives model nodes of the namespace torch."""
    cluster.environment_volume(namespace)
    return node_template()


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Figures:
    """What is measured; told at the end."""
    return request.config.stash.setdefault(FIGURES, Figures())


@pytest.fixture(scope="session")
def release(cluster: Cluster, figures: Figures) -> Release:
    """The chart, installed once. Tests leave workflows behind: the next ones use their models."""
    release = Release(cluster, "kd")
    figures.add("helm install, until all of the chart is ready", release.install())
    return release


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    figures = config.stash.get(FIGURES, None)
    if figures is None or not figures.rows:
        return
    figures.write()
    terminalreporter.section("figures, also in benchmarks/results/e2e.csv")
    for line in figures.lines():
        terminalreporter.write_line(line)
