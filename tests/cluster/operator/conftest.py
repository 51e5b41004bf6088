# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Operators as real processes against the session's real API server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.kube import ControlPlane, Kube
from tests.cluster.operator.fake_kubelet import FakeKubelet
from tests.cluster.operator.fake_node import FakeNode
from tests.cluster.operator.running import ACCOUNT, OperatorProcess, authorize

NewOperator = Callable[..., OperatorProcess]


@pytest.fixture
def new_operator(
    control_plane: ControlPlane,
    admin: Kube,
    crds: list[str],
    namespace: str,
    token_for: Callable[[str], str],
    tmp_path: Path,
) -> Iterator[NewOperator]:
    """Makes an operator of the test's namespace, not started, with a Role of just that one."""
    made: list[OperatorProcess] = []

    def new(**options: Any) -> OperatorProcess:
        token = token_for(ACCOUNT)
        authorize(admin, ACCOUNT, namespace, namespace)
        options = {"namespace": namespace, **options}
        operator = OperatorProcess(tmp_path / f"op{len(made)}", control_plane, token, **options)
        made.append(operator)
        return operator

    yield new
    for operator in made:
        operator.stop()


@pytest.fixture
def operator(new_operator: NewOperator) -> OperatorProcess:
    """Running, and everything listed."""
    operator = new_operator()
    operator.start()
    operator.wait_ready()
    return operator


@pytest.fixture
def node() -> Iterator[FakeNode]:
    """What answers at the address of every pod that the fake kubelet makes Ready."""
    with FakeNode() as node:
        yield node


@pytest.fixture
def kubelet(kube: Kube, node: FakeNode) -> Iterator[FakeKubelet]:
    """Pods of the test's namespace become Ready, unless the test says otherwise."""
    with FakeKubelet(kube) as kubelet:
        yield kubelet
