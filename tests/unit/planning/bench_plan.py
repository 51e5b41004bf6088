# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How long a plan takes: python -m tests.unit.planning.bench_plan [WORKFLOWS [PIPELINES]]

The default is 500 workflows over 100 models (20 pipelines of 5). Each number is the best of several
on whatever else the machine does; `edit` is the plan right after one workflow's spec changed.
"""

from __future__ import annotations

import sys
import time

from kubediffusion_operator.planning import Plan, PlanCache
from tests.unit.planning.world import World

EDITS = 20


def timed(world: World) -> tuple[float, Plan]:
    begin = time.perf_counter()
    made = world.plan()
    return (time.perf_counter() - begin) * 1000, made


def main(workflows: int = 500, pipelines: int = 20) -> None:
    world = World()
    for number in range(workflows):
        lora = {"name": f"l{number % 50}", "source": {"uri": f"hf://org/l{number % 50}"}}
        world.workflow(f"w{number:03}", model=f"m{number % pipelines}", loras=[lora])
    for round_ in range(6):
        took, made = timed(world)
        print(f"round {round_}: {took:6.0f} ms, {made.writes} writes")
        world.carry_out(made)
        world.collect()
        world.run_pods()
    print(f"settled:   {min(timed(world)[0] for _ in range(5)):6.0f} ms")
    world.cache = PlanCache()
    print(f"restarted: {timed(world)[0]:6.0f} ms (nothing is known from before)")
    edits: list[float] = []
    for number in range(EDITS):
        scaling = {"minReplicas": 1, "maxReplicas": 2 + number}
        name = f"w{number % pipelines:03}"
        spec = world.get("DiffusionWorkflow", name)["spec"]
        models = {"transformer": {"scaling": scaling}}
        world.put("DiffusionWorkflow", name, {**spec, "models": models})
        took, made = timed(world)
        edits.append(took)
        while made.writes:
            world.carry_out(made)
            took, made = timed(world)
            edits.append(took)
    edits.sort()
    print(
        f"edit:      {edits[len(edits) // 2]:6.0f} ms, at the 95th percentile "
        f"{edits[int(len(edits) * 0.95)]:.0f} ms"
    )
    print(f"{len(world.all('DiffusionModel'))} models, {len(world.objects)} objects")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
