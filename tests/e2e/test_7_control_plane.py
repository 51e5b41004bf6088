# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Whoever steers may go: what is served is served on, and what was asked for is done later."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.figures import Figures
from tests.e2e.load import Load
from tests.e2e.release import Release, tiny

DRAIN = {"transformer": {"drainSeconds": 15}}
OTHER = {"transformer": {"drainSeconds": 20}}


@pytest.fixture
def load(release: Release) -> Iterator[Load]:
    """A client that asks again, with the same idempotency key, where it lost its gateway."""
    release.serve(tiny("tiny-sd3", DRAIN))
    with Load(release.url, "tiny-sd3", rate=0.7, most=4, steps=20, retries=3) as load:
        load.wait_done(2)
        yield load
    assert not load.failures
    assert all(len(digests) == 1 for digests in load.pictures().values()), load.pictures()


def test_a_rolling_restart_of_the_gateways_loses_no_request(
    release: Release, figures: Figures, load: Load
) -> None:
    deployment = f"deployment/{release.component('gateway')}"
    before = {pod["metadata"]["name"] for pod in release.pods("gateway")}
    release.kubectl("rollout", "restart", deployment)
    release.kubectl("rollout", "status", deployment, "--timeout=3m")
    release.kube.wait_all(
        "Pod",
        lambda pods: not before & {pod["metadata"]["name"] for pod in pods},
        selector="app.kubernetes.io/component=gateway",
        timeout=150,
    )
    load.wait_done(load.waiting + 2)
    failures = len(load.failures)
    figures.add("requests that failed as all gateways restarted", failures, "requests", at_most=0)


def test_requests_go_on_without_operator_and_api_server_and_edits_are_done_later(
    cluster: Cluster, release: Release, load: Load
) -> None:
    [operator] = release.pods("operator")
    # Nobody is told; nothing is closed.
    release.kube.delete("Pod", operator["metadata"]["name"], grace_seconds=0)
    release.apply(tiny("tiny-sd3", OTHER))
    with cluster.stopped_apiserver():
        load.wait_done(load.waiting + 3)
    release.ready("tiny-sd3")
    dit = release.models("tiny-sd3")["transformer"]

    def drains_as_told(deployment: dict) -> bool:
        spec = deployment["spec"]["template"]["spec"]
        seconds = OTHER["transformer"]["drainSeconds"]
        return spec["terminationGracePeriodSeconds"] >= seconds

    [deployment] = release.kube.list("Deployment", selector=f"kubediffusion.io/model={dit}")
    release.kube.wait_for("Deployment", deployment["metadata"]["name"], drains_as_told, timeout=60)
    load.wait_done(load.waiting + 1)
