# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""docs/scaling.md explains every reason that a status can have."""

from __future__ import annotations

import re
from pathlib import Path

from kubediffusion.scaling import Reason
from kubediffusion_operator.autoscaler.status import HINDRANCES

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/scaling.md").read_text()
CODE = ROOT / "operator/kubediffusion_operator/autoscaler"
OF_CHANGES = (
    *(Reason.ROSE, Reason.FELL, Reason.ACTIVATED, Reason.TO_ZERO),
    *(Reason.BELOW_MINIMUM, Reason.ABOVE_MAXIMUM, Reason.BUDGET, Reason.BUDGET_SHARED),
)


def test_reasons_of_changes_and_hindrances_are_explained():
    for reason in {*OF_CHANGES, *HINDRANCES, Reason.METRICS_UNKNOWN}:
        assert f"`{reason.value}`" in PAGE


def test_reasons_of_conditions_are_explained():
    named = re.compile(r'(?:because\(|UNKNOWN, |KNOWN, |Left\(model, |reason ?= ?)\s*"([A-Z]\w+)"')
    found = {word for file in CODE.glob("*.py") for word in named.findall(file.read_text())}
    assert {"NoGateway", "MetricsStale", "GatewayDown", "PrometheusTimeout", "External"} <= found
    assert {word for word in found if f"`{word}`" not in PAGE} == set()
