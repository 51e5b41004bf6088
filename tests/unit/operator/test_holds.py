# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from kubediffusion_operator.holding import BURST, REST_FIRST, REST_MOST, Holds, digest

KEY = ("ns", "Deployment", "m")


def test_a_first_write_goes_at_once() -> None:
    assert Holds().wait(KEY, "a", "1", 0.0) == 0


def test_a_refused_write_rests_longer_each_time_and_another_content_goes_at_once() -> None:
    holds, now = Holds(), 0.0
    rests = []
    for _ in range(9):
        holds.refused(KEY, "a", now)
        rests.append(holds.wait(KEY, "a", "1", now))
        now += rests[-1]
        assert holds.wait(KEY, "a", "1", now) == 0
    assert rests[:3] == [REST_FIRST, 2 * REST_FIRST, 4 * REST_FIRST]
    assert rests[-1] == REST_MOST
    holds.refused(KEY, "a", now)
    assert holds.wait(KEY, "b", "1", now) == 0
    assert holds.wait(("ns", "Deployment", "other"), "a", "1", now) == 0


def test_a_write_that_changes_nothing_rests_until_the_object_changes() -> None:
    holds = Holds()
    assert holds.wrote(KEY, "a", "7", "7", 0.0) is True
    assert holds.wait(KEY, "a", "7", 1.0) == REST_FIRST - 1
    assert holds.wait(KEY, "a", "8", 1.0) == 0


def test_a_write_that_changes_something_is_forgotten() -> None:
    holds = Holds()
    holds.refused(KEY, "a", 0.0)
    assert holds.wrote(KEY, "a", "7", "8", 6.0) is False
    assert holds.wait(KEY, "a", "8", 6.0) == 0


def test_an_object_that_is_written_back_every_time_is_written_once_a_second_at_most() -> None:
    holds, now, written = Holds(), 0.0, 0
    for version in range(10_000):
        now += 0.01
        if not holds.wait(KEY, f"{version}", f"{version}", now):
            holds.wrote(KEY, f"{version}", f"{version}", f"{version}+", now)
            written += 1
    assert BURST + 90 <= written <= BURST + 101


def test_what_is_long_over_or_of_a_namespace_that_is_gone_is_forgotten() -> None:
    holds = Holds()
    holds.refused(KEY, "a", 0.0)
    holds.refused(("other", "Deployment", "m"), "a", 0.0)
    holds.forget("other")
    assert holds.wait(("other", "Deployment", "m"), "a", "", 0.1) == 0
    holds.expire(10.0)
    assert holds.wait(KEY, "a", "", 0.1) > 0
    holds.expire(10_000.0)
    assert not holds._records


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2, {"c": 3}]}) == digest({"b": [2, {"c": 3}], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
