# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How long a task keeps its node: what it runs, and what goes around that."""

from __future__ import annotations

from kubediffusion.gateway.attempts import Attempt
from kubediffusion.scheduling.profiles import Profiles
from kubediffusion.v1alpha1 import gateway_pb2


class Taken:
    """`profiles` are of what nodes say that they ran; the way there and back, and pulling inputs,
    are learnt here, on the gateway's clock."""

    def __init__(self, profiles: Profiles) -> None:
        self._profiles = profiles
        self._around = Profiles()

    def observe(self, attempt: Attempt, time: gateway_pb2.StageTime) -> None:
        planned, timing = attempt.task.planned, time.timing
        around = max(0.0, time.total_seconds - timing.queue_seconds - timing.run_seconds)
        if planned.steps:  # what other tasks took of the node between its steps is not its own
            around = min(around, 0.02 + 0.1 * timing.run_seconds)
        self._around.observe_run(planned.model, planned.stage, "", 1.0, around)

    def seconds(self, model: str, stage: str, units: float) -> float | None:
        """None before the first measurement."""
        run = self._profiles.measured_run(model, stage, "", units)
        if run is None:
            return None
        return run + (self._around.measured_run(model, stage, "", 1.0) or 0.0)

    def forget_models(self, keep: frozenset[str]) -> None:
        self._around.forget_models(keep)
