# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One real API server a session (each pytest-xdist worker has its own), a namespace a test."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator

import pytest

from tests.cluster.kube import CRDS, AsyncKube, ControlPlane, Kube, NoPrograms


def _missing(error: NoPrograms) -> None:
    """Loud, and an error where nobody looks at what was skipped."""
    if os.environ.get("CI"):
        pytest.fail(str(error), pytrace=False)
    pytest.skip(f"NOT TESTED AGAINST KUBERNETES: {error}")


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """etcd, kube-apiserver, the controllers, and our CRDs. Shared: leave others' objects alone.

    Tests that stop the API server may do so; it must run again when they end.
    """
    try:
        plane = ControlPlane(tmp_path_factory.mktemp("control-plane"))
    except NoPrograms as error:
        _missing(error)
        raise
    try:
        plane.start(crds=CRDS)
        yield plane
    finally:
        plane.stop()


@pytest.fixture(scope="session")
def admin(control_plane: ControlPlane) -> Iterator[Kube]:
    """`kube` of the session: the cluster's administrator, in the namespace ``default``."""
    client = control_plane.kube()
    yield client
    client.close()


@pytest.fixture(scope="session")
def crds(control_plane: ControlPlane) -> list[str]:
    """The names of our CRDs, which are served."""
    return control_plane.apply_crds()


@pytest.fixture
def namespace(admin: Kube, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh namespace with its ServiceAccount ``default``; deleted after the test, unwaited."""
    words = re.sub("[^a-z0-9]+", "-", request.node.originalname.lower().removeprefix("test_"))
    name = f"{words[:40].strip('-')}-{secrets.token_hex(3)}"
    admin.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    admin.wait_for("ServiceAccount", "default", namespace=name)
    yield name
    admin.delete("Namespace", name, missing_ok=True)


@pytest.fixture
def kube(admin: Kube, namespace: str) -> Kube:
    """The cluster's administrator, in the test's own namespace."""
    return admin.within(namespace)


@pytest.fixture
def akube(kube: Kube) -> AsyncKube:
    """`kube` for tests in an event loop."""
    return AsyncKube(kube)


@pytest.fixture
def token_for(control_plane: ControlPlane, namespace: str) -> Callable[[str], str]:
    """A token of a ServiceAccount of the test's namespace; the account is made where missing."""

    def token(account: str) -> str:
        kube = control_plane.kube()
        body = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account}}
        kube.apply(body, namespace)
        kube.close()
        return control_plane.token_for(account, namespace)

    return token
