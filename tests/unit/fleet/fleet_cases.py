# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Small fleets with round numbers, and a simulation that checks what must always hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from hypothesis import strategies as st

from kubediffusion.scheduling.costs import Costs, Link, ModelCosts, Run
from kubediffusion.scheduling.pipelines import Job, Pipeline, Sizes
from kubediffusion.scheduling.policies.diflow import Tables
from kubediffusion.scheduling.policy import Start, Work
from kubediffusion.simulate.engine import Simulation
from kubediffusion.simulate.fleet import Build, build_fleet
from kubediffusion.simulate.outcome import Fault, FaultKind, Options, Outcome
from kubediffusion.simulate.settings import Setting
from kubediffusion.simulate.workload import Families

GB = 1e9


def model(seconds: float, gigabytes: float = 1.0, load: float = 1.0, gain: float = 0.95):
    """Batch 2 takes 2 x `gain` times as long as batch 1, and so on."""
    runs = tuple(Run(b, seconds * (1 if b == 1 else b * gain)) for b in (1, 2, 4, 8))
    return ModelCosts(load, gigabytes * GB, {"default": runs, "decode_latents": runs})


COSTS = Costs(
    {
        "text": model(0.010, 2.0),
        "small": model(0.050, 4.0),
        "small-control": model(0.010, 1.0),
        "large": model(0.200, 8.0, load=2.0),
        "vae": model(0.100, 0.2),
        "latents": model(0.001, 0.0, load=0.0),
        "sampler": model(0.0001, 0.0, load=0.0),
    },
    Link(((1e5, 1e-4), (1e8, 1e-3))),
    Link(((1e5, 2e-4), (1e8, 4e-3))),
)
_COMMON = {
    "encoders": ("text",),
    "decoder": "vae",
    "sampler": "sampler",
    "latents": "latents",
}
SMALL = Pipeline("small/A", "small", denoiser="small", steps=10, **_COMMON)
CONTROLLED = Pipeline(
    "small/B", "small", denoiser="small", steps=10, controls=("small-control",),
    sizes=Sizes(residuals=6), **_COMMON,
)  # fmt: skip
LARGE = Pipeline("large/A", "large", denoiser="large", steps=10, **_COMMON)
PIPELINES = (SMALL, CONTROLLED, LARGE)
FAMILIES = Families(
    {"small": {"A": SMALL, "B": CONTROLLED}, "large": {"A": LARGE, "B": LARGE}},
    {"small": 1.0, "large": 1.0},
)
MIX = {"small/A": 0.3, "small/B": 0.2, "large/A": 0.5}


def job(number: int, pipeline: Pipeline, arrival: float, scale: float = 2.0) -> Job:
    solo = pipeline.solo_seconds(COSTS)
    return Job(number, pipeline, arrival, arrival + scale * solo, solo)


def setting(gpus: int, gigabytes: float = 20.0) -> Setting:
    return Setting(
        "test", gpus, FAMILIES, gpus_per_host=4, node_bytes=gigabytes * GB,
        activation_bytes=0.0, monolith_bytes=gigabytes * GB,
    )  # fmt: skip


def build(gpus: int, gigabytes: float = 20.0, gateways: int = 1, **parameters) -> Build:
    tables = Tables({"small": (1, 2), "small-control": (1, 2), "text": (2, 4)})
    return Build(setting(gpus, gigabytes), COSTS, gpus, MIX, gateways, tables, parameters)


class Audited(Simulation):
    """Raises where something happens that never may. `whole`: a request is in one place at a time
    (DiFlow's branches are not, nor encoders on nodes of their own)."""

    def __init__(self, *arguments, whole: bool = True, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        self.forwards: Counter[tuple[int, str]] = Counter()
        self.closed: Counter[int] = Counter()
        self._whole = whole
        self._placed: dict[int, Work] = {}

    def _act(self, gateway, action):
        job = getattr(action, "job", None)
        if job is not None:
            self.closed[job.id] += 1
            assert self.closed[job.id] == 1, f"request {job.id} was closed twice"
        if isinstance(action, Start) and self._whole:
            for each in action.work.jobs:
                assert each.id not in self.closed, f"request {each.id} is over, and was placed"
                before = self._placed.get(each.id)
                assert before is None or before.ended, f"request {each.id} is in two places"
                self._placed[each.id] = action.work
            self._depends_on_what_is_there(action.work)
        super()._act(gateway, action)

    def _depends_on_what_is_there(self, work: Work) -> None:
        """Nothing is decoded before its last step, nor stepped before it was encoded: what came
        before either ran, or runs earlier in the very work."""
        for job in work.jobs:
            pipeline, counts = job.pipeline, Counter[str]()
            for call in work.calls:
                counts[call.model] += call.count
            if pipeline.name in counts:
                continue  # a monolith's one call

            def ran(model: str, job=job, counts=counts) -> int:
                return self.forwards[job.id, model] + counts[model]

            if counts[pipeline.denoiser]:
                assert ran(pipeline.encoders[0]), f"request {job.id} is denoised and not encoded"
            if counts[pipeline.decoder] and len(work.jobs) == 1:
                assert ran(pipeline.denoiser) == pipeline.steps, f"request {job.id} decoded early"

    def _begin(self, machine, work):
        assert machine.running is None, "two works at once on one machine"
        for index in (work.node, *work.helpers):
            assert self.machines[index].up, "work on a lost machine"
        super()._begin(machine, work)
        needed = {call.model for call in work.calls if call.model in machine.resident}
        assert needed or all(weightless(call.model) for call in work.calls)

    def _account(self, machine, running):
        work = running.work
        for call, done in zip(work.calls, work.done, strict=True):
            for each in work.jobs:
                self.forwards[each.id, call.model] += done
        super()._account(machine, running)

    def _decide(self):
        super()._decide()
        for machine in self.machines:
            assert machine.used <= machine.memory + 1.0, "more models than memory"


def weightless(model: str) -> bool:
    """Models without weights need no residency."""
    entry = COSTS.models.get(model)
    return entry is not None and entry.nbytes == 0.0


def simulated(
    policy: str, jobs: Sequence[Job], built: Build, options: Options | None = None
) -> tuple[Outcome, Audited]:
    fleet = build_fleet(policy, built)
    gateways = built.gateways
    simulation = Audited(
        fleet.machines, fleet.policies, jobs, fleet.costs, options or Options(),
        whole=not policy.startswith(("diflow", "dedicated")),
        gateway_of=(lambda each: each.id % gateways) if gateways > 1 else None,
    )  # fmt: skip
    return simulation.run(), simulation


@st.composite
def workloads(draw, most: int = 25, pipelines: Sequence[Pipeline] = PIPELINES) -> list[Job]:
    gaps = draw(st.lists(st.floats(0.0, 1.5), min_size=1, max_size=most))
    now, jobs = 0.0, []
    for number, gap in enumerate(gaps):
        now += gap
        pipeline = draw(st.sampled_from(pipelines))
        jobs.append(job(number, pipeline, now, draw(st.sampled_from((1.2, 2.0, 4.0)))))
    return jobs


@st.composite
def faults(draw, gpus: int) -> tuple[Fault, ...]:
    """Some nodes fail; the last one never does."""
    out = []
    for node in draw(st.lists(st.integers(0, gpus - 2), max_size=2, unique=True)):
        begin = draw(st.floats(0.0, 8.0))
        kind = draw(st.sampled_from(FaultKind))
        until = begin + draw(st.floats(1.0, 5.0))
        out.append(Fault(begin, node, kind, until=until))
    return tuple(out)


def on_time(jobs: Sequence[Job], outcome: Outcome) -> int:
    finished: Mapping[int, float] = outcome.finished
    return sum(each.id in finished and finished[each.id] <= each.deadline + 1e-9 for each in jobs)
