# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Estimates follow what was measured, and one odd run does not move them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubediffusion.scheduling.profiles import AMOUNTS, WINDOW, CostDefaults, Profiles

durations = st.floats(1e-6, 1e4)


def test_before_any_measurement_the_defaults_hold():
    profiles = Profiles(CostDefaults(run_seconds=3.0, load_seconds=7.0))
    assert profiles.run_seconds("m", "s", "f", 5) == 3.0
    assert profiles.measured_run("m", "s", "f", 5) is None
    assert profiles.load_seconds("m") == 7.0
    assert profiles.transfer_seconds(True, 0) == 0.0
    assert profiles.transfer_seconds(False, 200) > profiles.transfer_seconds(True, 200)


@given(st.lists(durations, min_size=1, max_size=40), st.floats(1, 1e6))
def test_an_estimate_lies_within_the_last_measurements(measured, units):
    profiles = Profiles()
    for value in measured:
        profiles.observe_run("m", "s", "f", units, value)
    last = measured[-WINDOW:]
    assert min(last) <= profiles.run_seconds("m", "s", "f", units) <= max(last)


@given(durations, st.floats(1, 100), st.integers(1, 3))
def test_a_few_disturbed_runs_do_not_move_it(usual, factor, disturbed):
    profiles = Profiles()
    for _ in range(WINDOW - disturbed):
        profiles.observe_run("m", "s", "f", 10, usual)
    for _ in range(disturbed):
        profiles.observe_run("m", "s", "f", 10, usual * factor)
    assert profiles.run_seconds("m", "s", "f", 10) == pytest.approx(usual)


@given(st.floats(1, 1e4), st.floats(1, 1e4), durations)
def test_an_amount_never_seen_is_scaled_from_the_others(seen, asked, value):
    profiles = Profiles()
    profiles.observe_run("m", "s", "f", seen, value)
    if seen != asked:
        scaled = value / seen * asked
        assert profiles.run_seconds("m", "s", "f", asked) == pytest.approx(scaled)


def test_another_kind_of_device_borrows_until_it_was_measured_itself():
    profiles = Profiles()
    profiles.observe_run("m", "s", "fast", 1, 1.0)
    assert profiles.run_seconds("m", "s", "slow", 1) == 1.0
    profiles.observe_run("m", "s", "slow", 1, 9.0)
    assert profiles.run_seconds("m", "s", "slow", 1) == 9.0
    assert profiles.run_seconds("m", "s", "fast", 1) == 1.0


@pytest.mark.parametrize("odd", [math.nan, math.inf, -1.0])
def test_what_cannot_be_a_time_is_left_out(odd):
    profiles = Profiles()
    profiles.observe_run("m", "s", "f", 1, odd)
    profiles.observe_load("m", odd)
    profiles.observe_transfer(True, 100, odd)
    assert profiles.measured_run("m", "s", "f", 1) is None
    assert profiles.load_seconds("m") == profiles.defaults.load_seconds


def test_transfers_and_loads_are_measured_too():
    profiles = Profiles()
    profiles.observe_load("m", 4.0)
    profiles.observe_transfer(True, 1000, 1.0)
    assert profiles.load_seconds("m") == 4.0
    assert profiles.transfer_seconds(True, 500) == 0.5


def test_what_is_kept_is_bounded_and_can_be_forgotten():
    profiles = Profiles()
    for units in range(1, 10 * AMOUNTS):
        profiles.observe_run("m", "s", "f", units, 1.0)
    assert len(profiles._runs["m", "s", "f"].by_units) == AMOUNTS
    profiles.forget_models(frozenset({"other"}))
    assert profiles.measured_run("m", "s", "f", 1) is None


def known(seconds=2.0, units=100.0, fingerprint="h100") -> dict[str, object]:
    row = {"model": "dit", "stage": "denoise", "fingerprint": fingerprint}
    return {**row, "units": units, "seconds": seconds}


def test_times_of_an_earlier_measurement_hold_until_there_are_own_ones():
    profiles = Profiles()
    profiles.begin_with([known()])
    assert profiles.run_seconds("dit", "denoise", "h100", 100.0) == 2.0
    assert profiles.run_seconds("dit", "denoise", "h100", 50.0) == pytest.approx(1.0)
    # Of another device nobody knows better.
    assert profiles.run_seconds("dit", "denoise", "l40", 100.0) == 2.0
    profiles.observe_run("dit", "denoise", "l40", 100.0, 7.0)
    assert profiles.run_seconds("dit", "denoise", "l40", 100.0) == 7.0
    assert profiles.run_seconds("dit", "denoise", "h100", 100.0) == 2.0
    profiles.observe_run("dit", "denoise", "h100", 100.0, 3.0)
    assert profiles.run_seconds("dit", "denoise", "h100", 100.0) == 3.0


def test_times_of_an_earlier_measurement_outlive_models_that_are_not_served_yet():
    profiles = Profiles()
    profiles.begin_with([known()])
    profiles.forget_models(frozenset())
    assert profiles.measured_run("dit", "denoise", "h100", 100.0) == 2.0


@pytest.mark.parametrize(
    "row", [known(units=0.0), known(seconds=-1.0), known(seconds=float("nan")), {"model": "dit"}]
)
def test_what_is_no_measurement_is_refused(row):
    with pytest.raises((KeyError, ValueError)):
        Profiles().begin_with([row])
