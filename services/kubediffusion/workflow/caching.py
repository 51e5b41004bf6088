# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What a step cache saves, told ahead: MagCache looks at the step's number and at no picture."""

from __future__ import annotations

from kubediffusion.workflow.values import StepCache


def computed_share(cache: StepCache | None, steps: int) -> float:
    """The share of a whole request's `steps` that its blocks compute; 1 where it cannot be told.

    Image-to-image runs the last part of the grid, which saves more: the first measurements correct
    this.
    """
    if cache is None or cache.method != "magcache" or steps < 1:
        return 1.0
    protected = int(cache.retention * steps + 0.5)
    ratio, error, run, reused = 1.0, 0.0, 0, 0
    for step in range(max(protected, 1), steps):
        ratio *= _ratio(cache.ratios, step, steps)
        error += abs(1.0 - ratio)
        run += 1
        if error <= cache.threshold and run <= cache.max_skip_steps:
            reused += 1
        else:
            ratio, error, run = 1.0, 0.0, 0
    return 1.0 - reused / steps


def _ratio(ratios: tuple[float, ...], step: int, steps: int) -> float:
    """Of the calibrated step that is nearest to this one."""
    return ratios[round(step * (len(ratios) - 1) / (steps - 1))]
