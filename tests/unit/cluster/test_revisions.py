# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Which revision a rollback means, and what is said of each."""

from __future__ import annotations

import pytest

from kubediffusion.cluster.revisions import differences, target
from kubediffusion.errors import InvalidInput
from kubediffusion.workflow.revision import Revision

THREE = [Revision(f"w-{number}", number, {}) for number in (3, 4, 7)]


@pytest.mark.parametrize(
    ("served", "to", "number"),
    [
        ("w-7", None, 4),  # all is as it should be: one step back
        ("w-4", None, 4),  # 7 is on its way, and shall not come
        ("w-3", None, 3),
        ("", None, 4),  # nothing was ever served
        ("w-1", None, 4),  # what is served is not kept any more
        ("w-7", 3, 3),
        ("w-7", 7, 7),
    ],
)
def test_a_rollback_goes_to_what_was_served_before(
    served: str, to: int | None, number: int
) -> None:
    assert target(THREE, served, to).number == number


def test_a_revision_that_is_not_kept_is_told_with_those_that_are() -> None:
    with pytest.raises(InvalidInput, match="no revision 5; kept are: 3, 4, 7"):
        target(THREE, "w-7", 5)


@pytest.mark.parametrize("count", [0, 1])
def test_there_must_be_something_to_go_back_to(count: int) -> None:
    with pytest.raises(InvalidInput):
        target(THREE[:count], "w-3", None)


def test_an_update_that_was_never_served_is_undone_by_its_first_revision() -> None:
    assert target(THREE[:2], "w-3", None).number == 3


def test_changes_are_named_by_their_fields() -> None:
    old = {"pipeline": {"source": {"uri": "a", "revision": "1"}}, "loras": [{"name": "x"}]}
    new = {"pipeline": {"source": {"uri": "a", "revision": "2"}}, "strategy": "Replace"}
    assert differences(old, new) == ("loras", "pipeline.source.revision", "strategy")
    assert differences(old, old) == ()
