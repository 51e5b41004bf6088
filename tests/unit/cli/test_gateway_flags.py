# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which policy a gateway in a cluster runs."""

from __future__ import annotations

import pytest

from kubediffusion.cluster.flags import parse
from kubediffusion.scheduling.policies.live import NAMES, QUEUE


def test_a_gateway_takes_its_policy_by_flag_or_by_variable() -> None:
    assert parse([], {}).policy == QUEUE
    assert parse([], {"KUBEDIFFUSION_POLICY": "kubediffusion"}).policy == "kubediffusion"
    for name in NAMES:
        assert parse(["--policy", name], {"KUBEDIFFUSION_POLICY": "queue"}).policy == name


def test_another_name_is_refused_with_those_that_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(["--policy", "fastest"], {})
    said = capsys.readouterr().err
    assert all(name in said for name in NAMES)
