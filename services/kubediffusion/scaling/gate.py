# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What of an allocation may be asked for now: GPUs are free when the pods on them are gone."""

from __future__ import annotations

from collections.abc import Mapping

from kubediffusion.scaling.allocation import Allocation
from kubediffusion.scaling.types import Budget, ModelCase


def admit(cases: Mapping[str, ModelCase], allocation: Allocation, budget: Budget) -> dict[str, int]:
    """Replicas by model: every reduction at once, and every addition for which there is room. A
    group from zero gets its first replicas together."""
    granted = {
        name: min(allocation.replicas[name], case.observation.current)
        for name, case in cases.items()
    }
    for name, case in cases.items():  # a minimum is the user's own word
        least = min(allocation.replicas[name], case.limits.minimum)
        granted[name] = max(granted[name], least)
    room = _room(cases, granted, budget)
    for group in allocation.groups:
        missing = [name for name in group.models if not granted[name]]
        cost = sum(cases[name].gpus for name in missing)
        if room is None or not cost or cost <= room:
            granted |= dict.fromkeys(missing, 1)
            room = None if room is None else room - cost
    for name, case in cases.items():
        more = allocation.replicas[name] - granted[name]
        if more <= 0 or not granted[name]:
            continue
        if room is not None and case.gpus:
            more = max(0, min(more, room // case.gpus))
            room -= more * case.gpus
        granted[name] += more
    return granted


def _room(cases: Mapping[str, ModelCase], granted: Mapping[str, int], budget: Budget) -> int | None:
    """GPUs that nobody holds and nobody was promised; None: no bound."""
    rooms: list[int] = []
    if budget.bound is not None:
        held = sum(
            (max(granted[name], case.live) + case.ending) * case.gpus
            for name, case in cases.items()
        )
        rooms.append(budget.bound - held)
    if budget.quota is not None:
        coming = sum(max(0, granted[name] - case.live) * case.gpus for name, case in cases.items())
        rooms.append(budget.quota - budget.quota_used - coming)
    return min(rooms) if rooms else None
