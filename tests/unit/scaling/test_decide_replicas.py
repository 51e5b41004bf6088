# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One model: examples worked by hand, and what holds for any numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scaling_cases import (
    NOW,
    demands,
    histories,
    limits,
    metrics,
    observations,
    run_alone,
)

from kubediffusion.scaling import (
    Demand,
    Limits,
    Metrics,
    MetricState,
    Observation,
    Policy,
    PolicyType,
    Reason,
    Rules,
    ScaleEvent,
    ScalingHistory,
    Select,
    decide,
)
from kubediffusion.scaling.types import DOWN, UP

KNOWN = st.just(Metrics())
UNKNOWN = Metrics(MetricState.UNKNOWN, "PrometheusUnreachable", "prometheus:9090 does not answer")
PARTIAL = Metrics(MetricState.PARTIAL, "GatewayDown", "1 of 2 gateways does not answer")
WIDE = Limits(minimum=0, maximum=20, target=2.0)


def at(current: int, **more: object) -> Observation:
    demand = Demand(running=float(more.pop("demand", 0)))  # type: ignore[arg-type]
    return Observation(current=current, demand=demand, ready=current, **more)  # type: ignore


def settled(replicas: int) -> ScalingHistory:
    """So many were right for the last ten minutes."""
    return ScalingHistory.begin(NOW - 10, replicas)


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("current", "demand", "replicas", "reason"),
    [
        (1, 2, 1, Reason.STEADY),
        (1, 2.2, 1, Reason.STEADY),  # 10 % over is within the tolerance
        (1, 2.3, 2, Reason.ROSE),
        (1, 6, 3, Reason.ROSE),
        (2, 3.6, 2, Reason.STEADY),
        (2, 7, 4, Reason.ROSE),
        (1, 100, 5, Reason.ROSE),  # 4 pods are more than 100 % of 1
        (6, 100, 12, Reason.ROSE),  # 100 % of 6 are more than 4 pods
        (15, 100, 20, Reason.ROSE),
        (20, 100, 20, Reason.AT_MAXIMUM),
        (0, 1, 1, Reason.ACTIVATED),
        (0, 0.01, 1, Reason.ACTIVATED),
        (0, 7, 4, Reason.ACTIVATED),
        (0, 0, 0, Reason.STEADY),
        (3, 2, 3, Reason.STABILIZING),
        (1, 0, 1, Reason.STABILIZING),
    ],
)
def test_up_at_once_and_down_not_before_the_window(current, demand, replicas, reason):
    decision = decide(at(current, demand=demand), WIDE, settled(current), NOW)
    assert (decision.replicas, decision.reason) == (replicas, reason)


def test_every_part_of_the_demand_counts():
    demand = Demand(held=1, queued=2, running=3, shed=1.5)
    decision = decide(Observation(current=1, demand=demand, ready=1), WIDE, settled(1), NOW)
    assert decision.replicas == 4
    assert decision.message == (
        "demand 7.5 (held 1, queued 2, running 3, shed 1.5) at 2 a replica asks for 4; "
        "limits 0 to 20; 1 ready"
    )


def test_down_follows_when_the_whole_window_agrees():
    series = run_alone(at(5, demand=2), WIDE, ticks=62)
    # A process that starts now takes the 5 for right until now: 300 s, 60 ticks of 5 s.
    assert series[:60] == [5] * 60
    assert series[60:] == [1, 1]


def test_the_greatest_recommendation_of_the_window_counts():
    history = ScalingHistory()
    for ago, replicas in ((290, 4), (200, 3), (100, 2)):
        history = history.recommended(NOW - ago, replicas, 600)
    assert decide(at(5, demand=2), WIDE, history, NOW).replicas == 4
    assert decide(at(5, demand=2), WIDE, history, NOW + 20).replicas == 3
    assert decide(at(5, demand=2), WIDE, history, NOW + 120).replicas == 2
    assert decide(at(5, demand=2), WIDE, history, NOW + 201).replicas == 1


def test_to_zero_only_where_zero_is_allowed():
    long_quiet = ScalingHistory.begin(NOW - 301, 1)
    assert decide(at(1), WIDE, long_quiet, NOW).replicas == 0
    assert decide(at(1), WIDE, long_quiet, NOW).reason is Reason.TO_ZERO
    kept = decide(at(1), replace(WIDE, minimum=1), long_quiet, NOW)
    assert (kept.replicas, kept.reason) == (1, Reason.AT_MINIMUM)


def test_a_little_demand_keeps_the_last_replica():
    assert decide(at(1, demand=0.001), WIDE, ScalingHistory(), NOW).replicas == 1


def test_rates_count_what_was_done_within_the_period():
    history = settled(1).scaled(NOW - 10, 4, 600)
    # 5 now, 1 fifteen seconds ago: 100 % gives 2, 4 pods give 5, and they are there already.
    assert decide(at(5, demand=40), WIDE, history, NOW).replicas == 5
    assert decide(at(5, demand=40), WIDE, history, NOW + 5).replicas == 10


def test_the_slowest_policy_where_it_is_selected():
    up = Rules(0.0, UP.policies, Select.MIN)
    decision = decide(at(1, demand=40), replace(WIDE, up=up), settled(1), NOW)
    assert (decision.replicas, decision.reason) == (2, Reason.ROSE)
    assert decision.message.endswith("RateLimited: 2 for now")


@pytest.mark.parametrize(("current", "demand"), [(0, 8), (1, 8), (5, 0)])
def test_a_disabled_direction_is_not_taken(current, demand):
    limits = replace(
        WIDE, up=replace(UP, select=Select.DISABLED), down=replace(DOWN, select=Select.DISABLED)
    )
    decision = decide(at(current, demand=demand), limits, ScalingHistory(), NOW)
    assert (decision.replicas, decision.reason) == (current, Reason.RATE_LIMITED)


def test_a_share_of_nothing_still_wakes_a_model():
    up = Rules(0.0, (Policy(PolicyType.PERCENT, 50, 15.0),))
    assert decide(at(0, demand=8), replace(WIDE, up=up), settled(0), NOW).replicas == 1


def test_an_up_window_waits_until_it_is_sure():
    limits = replace(WIDE, up=replace(UP, window=30.0))
    assert run_alone(at(1, demand=4), limits, ticks=8) == [1] * 6 + [2, 2]


@pytest.mark.parametrize("state", [Metrics(), PARTIAL, UNKNOWN])
def test_limits_hold_whatever_is_known(state):
    limits = Limits(minimum=2, maximum=4)
    below = decide(at(1, metrics=state), limits, settled(1), NOW)
    above = decide(at(9, metrics=state, demand=50), limits, settled(9), NOW)
    assert (below.replicas, below.reason) == (2, Reason.BELOW_MINIMUM)
    assert (above.replicas, above.reason) == (4, Reason.ABOVE_MAXIMUM)


# ---------------------------------------------------------------- unknown is not zero


def test_unknown_demand_keeps_what_is_there():
    decision = decide(at(3, metrics=UNKNOWN), WIDE, ScalingHistory(), NOW)
    assert (decision.replicas, decision.reason) == (3, Reason.METRICS_UNKNOWN)
    assert "prometheus:9090 does not answer" in decision.message


def test_partial_demand_raises_and_never_lowers():
    more = decide(at(1, metrics=PARTIAL, demand=6), WIDE, ScalingHistory(), NOW)
    less = decide(at(3, metrics=PARTIAL, demand=1), WIDE, ScalingHistory(), NOW)
    assert (more.replicas, more.reason) == (3, Reason.ROSE)
    assert (less.replicas, less.reason) == (3, Reason.METRICS_PARTIAL)
    assert "at least 1" in less.message


def test_an_outage_is_no_quiet_time():
    """After it a whole window of numbers has to pass before anything goes."""
    history = ScalingHistory.begin(NOW - 1000, 3)
    for tick in range(100):
        decision = decide(at(3, metrics=UNKNOWN), WIDE, history, NOW - 500 + tick * 5)
        history = history.recommended(NOW - 500 + tick * 5, decision.wanted, 300)
    assert decide(at(3), WIDE, history, NOW).replicas == 3


# ---------------------------------------------------------------- replicas that cannot start


def test_replicas_that_cannot_start_call_for_no_more():
    stuck = Observation(current=1, demand=Demand(held=40), stuck=1, stuck_reason="ErrImagePull")
    decision = decide(stuck, WIDE, settled(1), NOW)
    assert (decision.replicas, decision.reason) == (1, Reason.CANNOT_START)
    assert "1 cannot start (ErrImagePull)" in decision.message


def test_raising_ends_when_half_of_the_replicas_cannot_start():
    limits = replace(WIDE, maximum=1000)
    current, rounds = 2, []
    for tick in range(50):
        stuck = max(0, current - 2)  # only two ever start
        now = NOW + 20 * tick
        observed = Observation(current, Demand(held=5000), ready=2, stuck=stuck)
        current = decide(observed, limits, ScalingHistory(), now).replicas
        rounds.append(current)
    assert rounds[-1] == rounds[0] == 6


def test_one_bad_replica_of_many_does_not_stop_the_rest():
    observed = Observation(current=5, demand=Demand(running=16), ready=4, stuck=1)
    assert decide(observed, WIDE, settled(5), NOW).replicas == 8


def test_replicas_that_cannot_start_are_no_capacity():
    """Two of three serve two requests each, as they should: the third is not needed, and it must
    not count as one that is."""
    observed = Observation(current=3, demand=Demand(running=4), ready=2, stuck=1)
    assert decide(observed, WIDE, settled(3), NOW).wanted == 2


# ---------------------------------------------------------------- for any numbers


@given(observations(), limits(), histories())
def test_never_outside_the_limits(observation, limits, history):
    replicas = decide(observation, limits, history, NOW).replicas
    assert limits.minimum <= replicas <= limits.maximum


@given(observations(), limits(), histories())
def test_never_lower_on_numbers_that_nobody_vouches_for(observation, limits, history):
    decision = decide(observation, limits, history, NOW)
    state = observation.metrics.state
    if state is not MetricState.KNOWN:
        assert decision.replicas >= min(observation.current, limits.maximum)
        assert decision.wanted >= observation.current
    if state is MetricState.UNKNOWN:
        assert decision.replicas <= max(observation.current, limits.minimum)


@given(observations(), limits(), histories(), demands, demands)
def test_more_demand_never_means_fewer_replicas(observation, limits, history, one, other):
    less, more = sorted((one, other), key=lambda demand: demand.total)
    low = decide(replace(observation, demand=less), limits, history, NOW)
    high = decide(replace(observation, demand=more), limits, history, NOW)
    assert low.replicas <= high.replicas
    assert low.wanted <= high.wanted


@given(observations(), limits(), histories())
def test_nothing_goes_below_zero_or_away_while_there_is_demand(observation, limits, history):
    decision = decide(observation, limits, history, NOW)
    if observation.demand.total > 0 and observation.current > 0:
        assert decision.replicas >= 1
    if decision.replicas == 0:
        assert limits.minimum == 0


@given(observations(metrics=metrics), limits())
def test_constant_demand_comes_to_rest(observation, limits):
    observation = replace(observation, stuck=0, ready=observation.current, starting=0)
    series = run_alone(observation, limits, ticks=400)
    changes = [b - a for a, b in zip([observation.current, *series], series, strict=False)]
    ways = {change > 0 for change in changes if change}
    assert len(ways) <= 1, "it turns round"
    # A window of 60 ticks, and 20 replicas at one in 12 ticks, the slowest that is drawn here.
    assert not any(changes[-30:]), "it goes on"


@given(observations(), limits(), histories(), st.data())
def test_rates_hold_over_every_period(observation, limits, history, data):
    """Whatever the demand does: within no period is more added or taken than the policies say."""
    limits = replace(limits, minimum=0, maximum=1000)
    observation = replace(observation, stuck=0, metrics=Metrics())
    history = ScalingHistory.begin(NOW, observation.current)
    current, log = observation.current, [(NOW - 1e6, observation.current)]
    for tick in range(30):
        now = NOW + 5 * tick
        demand = data.draw(demands)
        decision = decide(
            replace(observation, current=current, demand=demand), limits, history, now
        )
        history = history.recommended(now, decision.wanted, 3600)
        _assert_allowed(limits, log, current, decision.replicas, now)
        if decision.replicas != current:
            history = history.scaled(now, decision.replicas - current, 3600)
            current = decision.replicas
            log.append((now, current))


def _assert_allowed(limits, log, current, replicas, now):
    """By the log alone: the number at the start of each policy's period, and what it allows."""
    rules = limits.up if replicas > current else limits.down
    if replicas == current:
        return
    assert rules.select is not Select.DISABLED
    reaches = []
    for policy in rules.policies:
        start = [n for time, n in log if time <= now - policy.period][-1]
        sign = 1 if replicas > current else -1
        share = start * policy.value / 100 if policy.type is PolicyType.PERCENT else policy.value
        reaches.append(start + sign * share)
    if replicas > current:
        reach = max(reaches) if rules.select is Select.MAX else min(reaches)
        assert replicas <= max(1 if current == 0 else 0, reach + 1)
        assert replicas < max(2 if current == 0 else 0, reach + 1)
    else:
        reach = min(reaches) if rules.select is Select.MAX else max(reaches)
        assert replicas >= 0
        assert replicas > reach - 1


# ---------------------------------------------------------------- a HorizontalPodAutoscaler


def hpa(observation: Observation, limits: Limits, history: ScalingHistory, now: float) -> int:
    """What autoscaling/v2 says of an external metric with an AverageValue, in whole numbers."""
    current, total = observation.current, round(observation.demand.total * 1000)
    target = round(limits.target * 1000)
    down = target * current * round(1000 - limits.down.tolerance * 1000)
    up = target * current * round(1000 + limits.up.tolerance * 1000)
    desired = current if down <= total * 1000 <= up else -(-total // target)
    recommended = [desired], [desired]
    for each in history.recommendations:
        for known, rules in zip(recommended, (limits.up, limits.down), strict=True):
            if each.time > now - rules.window:
                known.append(each.replicas)
    stable = max(current, min(recommended[0]))
    stable = min(stable, max(recommended[1]))
    if stable > current:
        most = max(current, _hpa_reach(current, limits.up, history, now, 1))
        return max(limits.minimum, min(stable, most, limits.maximum))
    least = min(current, _hpa_reach(current, limits.down, history, now, -1))
    return min(limits.maximum, max(stable, least, limits.minimum))


def _hpa_reach(current, rules, history, now, sign):
    if rules.select is Select.DISABLED:
        return current
    reaches = []
    for policy in rules.policies:
        events = [e.change for e in history.events if e.time > now - policy.period]
        added = sum(change for change in events if change > 0)
        deleted = -sum(change for change in events if change < 0)
        start = max(0, current - added + deleted)
        if policy.type is PolicyType.PODS:
            reaches.append(start + sign * policy.value)
        elif sign > 0:
            reaches.append(-(-start * (100 + policy.value) // 100))
        else:
            reaches.append(start * (100 - policy.value) // 100)
    return (max if (rules.select is Select.MAX) == (sign > 0) else min)(reaches)


@given(
    observations(metrics=KNOWN),
    limits(),
    histories(),
    st.integers(0, 60),
    st.lists(st.integers(-3, 3)),
)
def test_like_a_horizontal_pod_autoscaler_where_that_one_knows(
    observation, limits, history, total, changes
):
    """Above zero, with replicas that start and a metric that is there."""
    current = max(1, observation.current)
    events = tuple(ScaleEvent(NOW - 3 * i, change) for i, change in enumerate(changes))
    history = replace(history, events=events)
    observation = Observation(current, Demand(queued=float(total)), ready=current)
    expected = hpa(observation, limits, history, NOW)
    assert decide(observation, limits, history, NOW).replicas == expected
