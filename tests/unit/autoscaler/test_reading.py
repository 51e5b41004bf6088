# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What numbers mean: all of the demand, a part of it, or nothing that one could say."""

from __future__ import annotations

import math

import pytest
from autoscaler_cases import SPACE, STALE, answer, answers, reading

from kubediffusion.scaling import Demand, Metrics, MetricState
from kubediffusion_operator.autoscaler.reading import demand_of, reading_of

KNOWN, PARTIAL, UNKNOWN = MetricState.KNOWN, MetricState.PARTIAL, MetricState.UNKNOWN


def seen(model: str = "dit", namespace: str = SPACE, **numbers) -> tuple[Demand, Metrics]:
    return demand_of(reading(**numbers), namespace, model, STALE)


def test_all_gateways_report():
    demand, metrics = seen(held=1, queued=2, running=3, shed=0.5)
    assert demand == Demand(held=1, queued=2, running=3, shed=0.5)
    assert (metrics.state, metrics.reason) == (KNOWN, "MetricsFound")


def test_zero_is_a_measurement():
    assert seen() == (Demand(), Metrics(KNOWN, "MetricsFound", "all gateways report"))


def test_a_gateway_that_never_shed_has_no_such_series():
    assert seen(shed=None, queued=1)[1].state is KNOWN


@pytest.mark.parametrize(
    ("numbers", "state", "reason", "word"),
    [
        ({"up": {}}, UNKNOWN, "NoGateway", "see that one runs there"),
        ({"up": {"g1": 0, "g2": 0}, "ages": {}}, UNKNOWN, "GatewaysDown", "none of the 2"),
        ({"ages": {}}, UNKNOWN, "SeriesMissing", "none serves a workflow with it"),
        ({"ages": {"g1": 31, "g2": 300}}, UNKNOWN, "MetricsStale", "older than 30 s"),
        ({"running": math.nan}, UNKNOWN, "MetricsInvalid", "no count"),
        ({"queued": math.inf}, UNKNOWN, "MetricsInvalid", "no count"),
        ({"held": -1}, UNKNOWN, "MetricsInvalid", "no count"),
        ({"shed": math.nan}, UNKNOWN, "MetricsInvalid", "no count"),
        ({"up": {"g1": 1, "g2": 0}, "ages": {"g1": 1}}, PARTIAL, "GatewayDown", "1 of 2"),
        ({"up": {"g1": 1, "g2": 1}, "ages": {"g1": 1}}, PARTIAL, "GatewaySilent", "1 of 2"),
        ({"ages": {"g1": 1, "g2": 40}}, PARTIAL, "GatewaySilent", "1 of 2"),
        # Numbers of a target that is down, or that nobody scrapes any more, vouch for nothing.
        ({"up": {"g1": 0}, "ages": {"g1": 1}}, UNKNOWN, "GatewaysDown", "none of the 1"),
        ({"up": {"g1": 1}, "ages": {"gone": 1}}, UNKNOWN, "MetricsStale", "stopped"),
        ({"up": {"g1": math.nan}}, UNKNOWN, "GatewaysDown", "none of the 1"),
    ],
)
def test_what_is_missing_has_a_name_and_a_place_to_look(numbers, state, reason, word):
    _, metrics = seen(**{"queued": 3, **numbers})
    assert (metrics.state, metrics.reason) == (state, reason)
    assert word in metrics.why


def test_partial_numbers_are_a_lower_bound_and_unknown_ones_are_none():
    assert seen(queued=3, ages={"g1": 1})[0].total == 3
    assert seen(queued=3, up={})[0].total == 0


def test_another_model_or_namespace_is_not_this_one():
    assert seen("vae", queued=3)[1].reason == "SeriesMissing"
    assert seen(namespace="other", queued=3)[1].reason == "NoGateway"


@pytest.mark.parametrize("state", ["held", "queued", "running"])
def test_a_state_without_a_series_makes_the_rest_a_part(state):
    said = answers(queued=3, held=3, running=3)
    kept = [each for each in said["demand"].samples if each.labels.get("state") != state]
    said["demand"] = answer(*((each.labels, each.value) for each in kept))
    demand, metrics = demand_of(reading_of(said), SPACE, "dit", STALE)
    assert (metrics.state, metrics.reason) == (PARTIAL, "SeriesMissing")
    assert metrics.why.endswith(f"has no state {state}")
    assert demand.total == 6


def test_a_warning_of_prometheus_is_a_doubt():
    said = answers(queued=3)
    said["shed"] = answer(warnings=("store s3 did not answer",))
    _, metrics = demand_of(reading_of(said), SPACE, "dit", STALE)
    assert (metrics.state, metrics.reason) == (PARTIAL, "PartialAnswer")
    assert "store s3 did not answer" in metrics.why


@pytest.mark.parametrize("label", ["namespace", "model", "instance"])
def test_series_without_their_labels_are_nobodys(label):
    said = {
        name: answer(
            *(({k: v for k, v in s.labels.items() if k != label}, s.value) for s in each.samples)
        )
        for name, each in answers(queued=3).items()
    }
    _, metrics = demand_of(reading_of(said), SPACE, "dit", STALE)
    assert metrics.state is UNKNOWN


def test_unknown_states_are_not_added():
    said = answers(queued=3)
    extra = ({"namespace": SPACE, "model": "dit", "state": "dreaming"}, 99.0)
    said["demand"] = answer(*((s.labels, s.value) for s in said["demand"].samples), extra)
    assert demand_of(reading_of(said), SPACE, "dit", STALE)[0].total == 3
