# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One namespace or all of them, with no more rights than that takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.kube import ControlPlane, Kube
from tests.cluster.operator.conftest import NewOperator
from tests.cluster.operator.running import ACCOUNT, OperatorProcess, authorize, unique
from tests.cluster.operator.wanted import (
    models_of,
    models_of_all,
    pipeline,
    present,
    wait_for_models,
    workflow,
)


@pytest.fixture
def other(admin: Kube) -> Iterator[Kube]:
    """A second namespace."""
    name = unique("other")
    admin.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield admin.within(name)
    admin.delete("Namespace", name, missing_ok=True)


def test_an_operator_of_one_namespace_serves_that_one_without_cluster_rights(
    new_operator: NewOperator, kube: Kube, other: Kube, tmp_path: Path
) -> None:
    operator = new_operator()
    operator.start()
    operator.wait_ready()
    definition = workflow("sd3", pipeline(tmp_path / "p"))
    other.apply(definition)
    kube.apply(definition)
    wait_for_models(kube, set(models_of(definition).values()))
    assert present(other, "DiffusionModel") == set()
    assert operator.metric("api_errors_total", code="403") == 0


def test_an_operator_of_all_namespaces_keeps_them_apart(
    control_plane: ControlPlane,
    admin: Kube,
    kube: Kube,
    other: Kube,
    token_for: Callable[[str], str],
    tmp_path: Path,
) -> None:
    token = token_for(ACCOUNT)
    authorize(admin, ACCOUNT, kube.namespace)
    operator = OperatorProcess(tmp_path / "op", control_plane, token)
    try:
        operator.start()
        operator.wait_ready()
        shared = workflow("same", pipeline(tmp_path / "p"))
        mine = workflow("mine", pipeline(tmp_path / "q"))
        for each in (kube, other):
            each.apply(shared)
        kube.apply(mine)
        wait_for_models(kube, models_of_all([shared, mine]))
        wait_for_models(other, models_of_all([shared]))
        kube.delete("dwf", "same")
        wait_for_models(kube, models_of_all([mine]))
        wait_for_models(other, models_of_all([shared]))
        admin.delete("Namespace", other.namespace)
        admin.wait_gone("Namespace", other.namespace, timeout=60)
        operator.check()
        # A namespace that ends is no reason to go on asking.
        time.sleep(2)
        before = operator.metric("api_errors_total")
        time.sleep(3)
        assert operator.metric("api_errors_total") == before
    finally:
        operator.stop()
        name = f"{ACCOUNT}-{kube.namespace}"
        admin.delete("ClusterRoleBinding", name, missing_ok=True)
        admin.delete("ClusterRole", name, missing_ok=True)
