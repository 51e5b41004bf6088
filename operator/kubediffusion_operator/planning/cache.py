# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What need not be computed again in the next plan of a namespace.

Values are functions of their keys alone, so that a plan with an empty cache is the same plan,
slower. What a plan did not ask for is forgotten when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

T = TypeVar("T")


class PlanCache:
    """One for each namespace. Not for two threads at once."""

    def __init__(self) -> None:
        self._old: dict[Hashable, Any] = {}
        self._new: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `key`, made by `make` where it is not known. `make` may raise."""
        try:
            return cast(T, self._new[key])
        except KeyError:
            pass
        value = cast(T, self._old[key]) if key in self._old else make()
        self._new[key] = value
        return value

    def turn(self) -> None:
        """A plan ends: what it did not ask for goes."""
        self._old, self._new = self._new, {}

    def __len__(self) -> int:
        return len(self._old)
