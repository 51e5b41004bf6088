# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The chart is tested by Helm itself; where there is none it is built, once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest

from tests.cluster.kube import NoPrograms, programs
from tests.unit.chart.rendering import EVERYTHING, Helm, Rendered


def program(name: str) -> str:
    """The path of a program of scripts/cluster/assets. Skips, loudly, where it cannot be built."""
    try:
        found = shutil.which(name, path=programs(name))
    except NoPrograms as error:
        if os.environ.get("CI"):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(f"NOT TESTED, FOR WANT OF {name}: {error}")
    assert found is not None
    return found


# The first time, a program is built: 3 minutes for Helm, 5 for promtool.
@pytest.fixture(scope="session")
def helm() -> Helm:
    return Helm(program("helm"))


@pytest.fixture(scope="session")
def promtool() -> str:
    return program("promtool")


@pytest.fixture(scope="session")
def plain(helm: Helm) -> Rendered:
    """The chart with its own values."""
    return helm.render()


@pytest.fixture(scope="session")
def everything(helm: Helm) -> Rendered:
    return helm.render(EVERYTHING)


@pytest.fixture(params=["plain", "everything"])
def either(request: pytest.FixtureRequest) -> Rendered:
    return request.getfixturevalue(request.param)


Render = Callable[..., Rendered]


@pytest.fixture(scope="session")
def render(helm: Helm) -> Render:
    return helm.render
