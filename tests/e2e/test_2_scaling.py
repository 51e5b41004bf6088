# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Each model follows its own queue, by what a real Prometheus scrapes; nothing fails meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.cluster.kube import Object, condition
from tests.e2e.figures import Figures
from tests.e2e.load import Load
from tests.e2e.release import Release, tiny

# Two scrapes and one round of the autoscaler, 5 s each.
REACTION = 15.0
# How long a lower demand must last. Rounds are 5 s apart.
WINDOW = 15
ROUNDS_OF_A_WINDOW = 5
SCALING = {
    "minReplicas": 1,
    "maxReplicas": 3,
    "targetPerReplica": "3",
    "behavior": {"scaleDown": {"stabilizationWindowSeconds": WINDOW}},
}
# Encoders take milliseconds: a few that wait are no queue, also on a machine that stalls.
OF_OTHERS = {**SCALING, "targetPerReplica": "10"}
ROLES = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")


@pytest.fixture(scope="module")
def models(release: Release) -> dict[str, str]:
    """By role. Every one of them may scale."""
    scaling = {role: {"scaling": OF_OTHERS} for role in ROLES}
    scaling["transformer"] = {"scaling": SCALING}
    release.serve(tiny("tiny-sd3", scaling))
    return release.models("tiny-sd3")


@pytest.fixture(scope="module")
def dit(models: dict[str, str]) -> str:
    return models["transformer"]


@pytest.fixture
def load(release: Release, dit: str) -> Iterator[Load]:
    """A request now and then; every one of them gets its picture, the right one."""
    with Load(release.url, "tiny-sd3", rate=0.5, steps=20) as load:
        yield load
    assert not load.failures
    assert all(len(digests) == 1 for digests in load.pictures().values()), load.pictures()


def wanted(replicas: int) -> Callable[[Object], bool]:
    return lambda model: model["spec"]["replicas"] == replicas


def served_by(replicas: int) -> Callable[[Object], bool]:
    def serves(model: Object) -> bool:
        status = model.get("status", {})
        return wanted(replicas)(model) and status.get("readyReplicas", 0) == replicas

    return serves


def metrics(status: str) -> Callable[[Object], bool]:
    return lambda model: condition(model, "MetricsAvailable").get("status") == status


def wait_rounds(release: Release, count: int, timeout: float = 60.0) -> None:
    """Until the autoscaler has looked so many times more."""
    name = "kubediffusion_operator_autoscale_seconds_count"
    end = time.monotonic() + timeout
    goal = release.metric("operator", name) + count
    while release.metric("operator", name) < goal:
        assert time.monotonic() < end, f"the autoscaler has not looked {count} times"
        time.sleep(0.5)


def test_a_load_on_the_transformer_raises_it_alone_and_an_outage_of_prometheus_holds_it(
    release: Release, figures: Figures, models: dict[str, str], dit: str, load: Load
) -> None:
    kube = release.kube
    kube.wait_for("DiffusionModel", dit, served_by(1), timeout=60)
    kube.wait_for("DiffusionModel", dit, metrics("True"), timeout=60)

    load.rate = 3.0
    begin = time.monotonic()
    kube.wait_for("DiffusionModel", dit, wanted(3), timeout=60)
    figures.add("load to desired replicas, 1 to 3", time.monotonic() - begin, at_most=REACTION)
    load.rate = 1.5
    kube.wait_for("DiffusionModel", dit, served_by(3), timeout=120)
    figures.add("load to ready replicas, 1 to 3", time.monotonic() - begin)

    release.scale("prometheus", 0)
    blind = kube.wait_for("DiffusionModel", dit, metrics("False"), timeout=60)
    said = condition(blind, "MetricsAvailable")
    assert said["reason"] in ("PrometheusUnreachable", "PrometheusTimeout")
    assert "replicas stay as they are" in said["message"]
    load.rate = 0.5
    wait_rounds(release, ROUNDS_OF_A_WINDOW)
    assert kube.get("DiffusionModel", dit)["spec"]["replicas"] == 3

    release.scale("prometheus", 1)
    kube.wait_for("DiffusionModel", dit, metrics("True"), timeout=60)
    # Nobody had to do anything; and requests go on while two of three nodes go.
    kube.wait_for("DiffusionModel", dit, served_by(1), timeout=180)
    load.wait_done(5)
    reasons = [each["reason"] for each in release.history(dit)]
    assert reasons[-1] == "DemandRose"
    assert reasons[0] == "DemandFell"
    others = {role: release.history(models[role]) for role in ROLES if role != "transformer"}
    assert not any(others.values()), others
    figures.add("requests while scaling up and down", len(load.shots), "requests")
    figures.add("of these failed", len(load.failures), "requests", at_most=0)


def test_a_model_goes_to_zero_and_comes_back_for_a_request_that_is_held(
    release: Release, figures: Figures, dit: str
) -> None:
    idle = {**SCALING, "minReplicas": 0}
    release.apply(tiny("tiny-sd3", {"transformer": {"scaling": idle}}))
    release.kube.wait_for("DiffusionModel", dit, wanted(0), timeout=90)
    nodes = f"kubediffusion.io/model={dit}"
    release.kube.wait_all("Pod", lambda pods: not pods, selector=nodes, timeout=60)
    begin = time.monotonic()
    with Load(release.url, "tiny-sd3", rate=0.2, steps=20) as load:
        release.kube.wait_for("DiffusionModel", dit, wanted(1), timeout=60)
        seconds = time.monotonic() - begin
        figures.add("held request to desired replicas, 0 to 1", seconds, at_most=REACTION)
        load.wait_done(1)
        figures.add("held request to its image, 0 to 1", time.monotonic() - begin)
    assert not load.failures
    assert release.history(dit)[0]["reason"] == "Activated"
