# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""What no policy can exceed on a trace: one fluid machine that knows every request in advance."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence

from kubediffusion.scheduling.pipelines import Job


def most_on_time(jobs: Sequence[Job], work: Callable[[Job], float], speed: float) -> int:
    """Moore and Hodgson (1968): the most jobs that one machine of `speed` ends by their deadlines
    when all are there at t = 0 and may be spread over all accelerators at will."""
    return len(jobs) - len(_late(jobs, work, speed))


def _late(jobs: Sequence[Job], work: Callable[[Job], float], speed: float) -> list[Job]:
    done, taken, late = 0.0, list[tuple[float, int, Job]](), list[Job]()
    for job in sorted(jobs, key=lambda each: each.deadline):
        seconds = work(job) / speed
        heapq.heappush(taken, (-seconds, job.id, job))
        done += seconds
        if done > job.deadline:
            longest, _, dropped = heapq.heappop(taken)
            done += longest
            late.append(dropped)
    return late


def best_attainment(jobs: Sequence[Job], work: Callable[[Job], float], speed: float) -> float:
    return most_on_time(jobs, work, speed) / len(jobs) if jobs else 1.0


def reaches_by_family(
    jobs: Sequence[Job], work: Callable[[Job], float], speed: float, share: float
) -> bool:
    """Whether every family by itself can have `share` of its requests on time, at most.

    An upper limit too: each family may drop its heaviest `1 - share`, and what is left only has to
    fit in the order of deadlines.
    """
    by_family: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        by_family[job.pipeline.family].append(job)
    for members in by_family.values():
        if len(members) - _least(members, share) < 0:
            return False
    allowed = {name: len(each) - _least(each, share) for name, each in by_family.items()}
    done, taken = 0.0, list[tuple[float, int, Job]]()
    for job in sorted(jobs, key=lambda each: each.deadline):
        seconds = work(job) / speed
        heapq.heappush(taken, (-seconds, job.id, job))
        done += seconds
        while done > job.deadline:
            # The longest of a family that may still lose one.
            kept: list[tuple[float, int, Job]] = []
            found = False
            while taken:
                entry = heapq.heappop(taken)
                if allowed[entry[2].pipeline.family] > 0:
                    allowed[entry[2].pipeline.family] -= 1
                    done += entry[0]
                    found = True
                    break
                kept.append(entry)
            for entry in kept:
                heapq.heappush(taken, entry)
            if not found:
                return False
    return True


def _least(members: Sequence[Job], share: float) -> int:
    """The fewest on time that are `share` of the members."""
    return next(k for k in range(len(members) + 1) if k >= share * len(members) - 1e-9)
