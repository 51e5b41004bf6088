# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What tenants had lately, so that who has to give is not who came at a bad moment."""

from __future__ import annotations

import math

# Less than this is as good as nothing: such a tenant is forgotten.
_LEAST = 1e-3


class Tenants:
    """Node seconds that each tenant was served, forgotten exponentially over `memory` seconds."""

    def __init__(self, memory: float = 60.0) -> None:
        self._memory = memory
        self._served: dict[str, tuple[float, float]] = {}

    def serve(self, tenant: str, seconds: float, now: float) -> None:
        self._served[tenant] = (self.of(tenant, now) + seconds, now)
        if len(self._served) > 1:
            self._forget(now)

    def of(self, tenant: str, now: float) -> float:
        seconds, then = self._served.get(tenant, (0.0, now))
        return seconds * math.exp((then - now) / self._memory)

    def _forget(self, now: float) -> None:
        for tenant in [each for each in self._served if self.of(each, now) < _LEAST]:
            del self._served[tenant]
