# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The release changes its values under load, and goes."""

from __future__ import annotations

from tests.e2e.cluster import Cluster
from tests.e2e.figures import Figures
from tests.e2e.load import Load
from tests.e2e.release import Release, tiny

OTHER_VALUES = {
    "logLevel": "DEBUG",
    "gateway": {"replicas": 3},
    "operator": {"podLabels": {"team": "images"}},
}


def test_an_upgrade_to_other_values_loses_no_request(release: Release, figures: Figures) -> None:
    release.serve(tiny("tiny-sd3"))
    with Load(release.url, "tiny-sd3", rate=0.7, most=4, steps=20, retries=3) as load:
        load.wait_done(2)
        release.upgrade(OTHER_VALUES)
        assert len(release.pods("gateway")) >= 3
        release.upgrade({})
        load.wait_done(load.waiting + 2)
    failures = len(load.failures)
    figures.add("requests that failed by two upgrades", failures, "requests", at_most=0)
    assert not load.failures
    assert all(len(digests) == 1 for digests in load.pictures().values())


def test_uninstalling_leaves_what_users_applied_and_nothing_is_stuck(
    cluster: Cluster, release: Release
) -> None:
    release.serve(tiny("tiny-sd3"))
    release.helm("uninstall", release.name, "--wait", "--timeout", "4m")
    # What users applied is theirs: it stays, and its models are served on by whoever still asks.
    assert release.kube.get("DiffusionWorkflow", "tiny-sd3")
    assert release.kube.list("DiffusionModel")
    # Nobody is left to take a finalizer off, and none is there.
    cluster.kube.delete("Namespace", release.namespace)
    cluster.kube.wait_gone("Namespace", release.namespace, timeout=180)
