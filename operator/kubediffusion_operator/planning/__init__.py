# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a namespace should hold, from what it holds. Pure.

`plan` takes an `Observed` and gives a `Plan`; a `PlanCache` makes the next one cheap.
"""

from kubediffusion_operator.planning.cache import PlanCache
from kubediffusion_operator.planning.plan import plan
from kubediffusion_operator.planning.types import Observed, Plan

__all__ = ["Observed", "Plan", "PlanCache", "plan"]
