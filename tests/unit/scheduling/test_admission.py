# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Who is taken and who is sent away, and for how long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kubediffusion.scheduling.admission import (
    MAX_RETRY_SECONDS,
    MIN_RETRY_SECONDS,
    AdmissionLimits,
    Admit,
    Shed,
    ShedReason,
    decide,
)

times = st.floats(0, 1e6)


@given(times, st.none() | times, st.none() | times, st.integers(0, 100), st.integers(1, 10))
def test_a_verdict_follows_from_the_numbers(ahead, solo, left, queued, count):
    limits = AdmissionLimits(max_queue=50)
    verdict = decide(
        work_ahead_seconds=ahead,
        solo_seconds=solo,
        deadline_remaining=left,
        queue_len=queued,
        limits=limits,
        images=count,
    )
    full = queued + count > 50
    late = solo is not None and left is not None and ahead + solo > left
    assert isinstance(verdict, Shed) == (full or late)
    if isinstance(verdict, Shed):
        assert verdict.reason is (ShedReason.QUEUE_FULL if full else ShedReason.DEADLINE_INFEASIBLE)
        assert MIN_RETRY_SECONDS <= verdict.retry_after <= MAX_RETRY_SECONDS


@given(times, times, times, times)
def test_less_work_ahead_never_turns_a_request_away(ahead, less, solo, left):
    def at(work: float) -> Admit | Shed:
        return decide(
            work_ahead_seconds=work,
            solo_seconds=solo,
            deadline_remaining=left,
            queue_len=0,
            limits=AdmissionLimits(),
        )

    if isinstance(at(max(ahead, less)), Admit):
        assert isinstance(at(min(ahead, less)), Admit)


def test_the_request_that_just_fits_is_taken():
    verdict = decide(
        work_ahead_seconds=1.0,
        solo_seconds=2.0,
        deadline_remaining=3.0,
        queue_len=9,
        limits=AdmissionLimits(max_queue=10),
    )
    assert verdict == Admit(3.0)


def test_before_anything_was_measured_a_deadline_is_no_reason():
    verdict = decide(
        work_ahead_seconds=5.0,
        solo_seconds=None,
        deadline_remaining=0.1,
        queue_len=0,
        limits=AdmissionLimits(),
    )
    assert verdict == Admit()
