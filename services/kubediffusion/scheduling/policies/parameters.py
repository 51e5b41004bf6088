# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What `kubediffusion` can be told. The defaults were tuned in the simulator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Parameters:
    """Seconds unless said otherwise. ``dispatch`` is a lease's overhead and ``sampler`` a step's;
    ``floor`` is the attainment that no family is pushed under while another can give (0: the most
    requests, whosever they are); ``order`` is "slack" or "arrival"; slack is from the deadline
    (``laxity`` 0) or from the latest start (1)."""

    dispatch: float = 0.002
    sampler: float = 0.0002
    order: str = "slack"
    laxity: float = 0.25
    floor: float = 0.0
    shed: bool = True
    foresee: bool = True
    optimism: float = 0.95
    batch: int = 3
    least_gain: float = 0.04
    # What was begun goes before what was not, by this share of its solo time, and this at most.
    begun: float = 0.25
    begun_most: float = 0.25
    margin: float = 0.01
    # A lease takes another request in only where its slack is this share of the other's work.
    least_slack: float = 0.1
    split: bool = True
    split_least: float = 0.3
    preempt: bool = True
    # Other gateways have work on the same nodes.
    shared: bool = False
    hysteresis: float = 0.2
    # Batch as soon as anybody waits, not only once somebody would have to be shed.
    eager: bool = True

    @property
    def laxity_share(self) -> float:
        """How much a rank rises for each second that a request is put off while it runs."""
        return 0.0 if self.order == "arrival" else self.laxity
