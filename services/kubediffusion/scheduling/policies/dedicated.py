# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""One model to a GPU, as plain per-model Deployments have it: what a pool of shared nodes saves.

Every model has replicas of its own. A request goes from node to node: its text encoders side by
side, all its steps on a denoiser's node while its ControlNets run beside it on theirs (they are
busy as long, and each step waits for the slower one and the residuals), its decoder. The earliest
deadline goes first; who cannot finish any more is dropped before its next stage.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kubediffusion.scheduling.costs import Costs
from kubediffusion.scheduling.pipelines import Job, Pipeline
from kubediffusion.scheduling.policies.monolith import load_partition
from kubediffusion.scheduling.policy import Action, Call, Finish, Node, Shed, Start, Work


def dedicated_plan(
    pipelines: Sequence[Pipeline], costs: Costs, mix: Mapping[str, float], nodes: int
) -> dict[int, tuple[str, ...]]:
    """The model of each node: one each, the others by load. Too few nodes leave models out."""
    loads: dict[str, float] = {}
    for each in pipelines:
        rate = mix.get(each.name, 0.0)
        seconds = {model: each.prompts * costs.run(model, 1) for model in each.encoders}
        busy = each.steps * _step_seconds(each, costs)
        seconds |= dict.fromkeys((each.denoiser, *each.controls), busy)
        seconds[each.decoder] = each.decode_seconds(costs)
        for model, value in seconds.items():
            loads[model] = loads.get(model, 0.0) + rate * value
    shares = load_partition(list(loads.values()), nodes)
    named = [model for model, share in zip(loads, shares, strict=True) for _ in range(share)]
    return {node: (model,) for node, model in enumerate(named)}


def _step_seconds(pipeline: Pipeline, costs: Costs) -> float:
    """The denoiser and the ControlNets beside each other, and what they exchange."""
    batch = pipeline.branches if pipeline.together else 1
    calls = pipeline.branches / batch
    slowest = max(costs.run(model, batch) for model in (pipeline.denoiser, *pipeline.controls))
    sizes, moved = pipeline.sizes, 0.0
    if pipeline.controls:
        moved = costs.transfer(sizes.latents, same_host=False)
        moved += costs.transfer(sizes.residual * batch, same_host=False)
    return calls * (slowest + moved)


@dataclass(slots=True, eq=False)
class _Request:
    job: Job
    left: float
    # What it waits for, in this stage: works that must end.
    open: int = 0
    at: int = -1


@dataclass(slots=True, eq=False)
class _Stage:
    """What a request needs next: nodes of these models at once, for those calls."""

    request: _Request
    models: tuple[str, ...]
    calls: tuple[Call, ...]
    kind: str
    seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self.seconds = sum(call.count * call.seconds for call in self.calls)


class Dedicated:
    def __init__(self, nodes: Sequence[Node], costs: Costs, dispatch: float = 0.002) -> None:
        self.nodes = nodes
        self.costs = costs
        self._dispatch = dispatch
        self._idle: dict[str, set[int]] = {}
        self._busy = set[int]()
        self._waiting: list[tuple[float, int, _Stage]] = []
        self._serial = 0
        self._gone = set[int]()
        self._out: list[Action] = []

    def fleet_changed(self, now: float) -> None:
        self._idle = {}
        for node in self.nodes:
            for model in node.resident:
                idle = self._idle.setdefault(model, set())
                if node.up and node.index not in self._busy:
                    idle.add(node.index)

    def arrived(self, job: Job, now: float) -> None:
        pipeline = job.pipeline
        if any(model not in self._idle for model in pipeline.models):
            self._out.append(Shed(job))
            return
        request = _Request(job, job.solo)
        request.left = self._encode_seconds(pipeline) + self._after_encoding(pipeline)
        self._encode(request)

    def _encode_seconds(self, pipeline: Pipeline) -> float:
        return max(self.costs.run(model, pipeline.prompts) for model in pipeline.encoders)

    def _after_encoding(self, pipeline: Pipeline) -> float:
        costs = self.costs
        return pipeline.steps * _step_seconds(pipeline, costs) + pipeline.decode_seconds(costs)

    def _encode(self, request: _Request) -> None:
        pipeline = request.job.pipeline
        request.open = len(pipeline.encoders)
        for model in pipeline.encoders:
            call = Call(model, 1, self.costs.run(model, pipeline.prompts), pipeline.prompts)
            self._wait(_Stage(request, (model,), (call,), "encode"))

    def _wait(self, stage: _Stage) -> None:
        self._serial += 1
        heapq.heappush(self._waiting, (stage.request.job.deadline, self._serial, stage))

    def ended(self, work: Work, now: float) -> None:
        stage: _Stage = work.info
        self._free(work)
        request, pipeline = stage.request, stage.request.job.pipeline
        request.at = work.node
        if stage.kind == "encode":
            request.open -= 1
            if request.open or request.left < 0:
                return
            request.left = self._after_encoding(pipeline)
            seconds = _step_seconds(pipeline, self.costs)
            call = Call(pipeline.denoiser, pipeline.steps, seconds, pipeline.branches)
            self._wait(_Stage(request, (pipeline.denoiser, *pipeline.controls), (call,), "step"))
        elif stage.kind == "step":
            request.left = pipeline.decode_seconds(self.costs)
            call = Call(pipeline.decoder, 1, request.left)
            self._wait(_Stage(request, (pipeline.decoder,), (call,), "decode"))
        else:
            self._out.append(Finish(request.job))

    def lost(self, work: Work, now: float) -> None:
        """The stage begins again: what came before it lies on other nodes."""
        self._free(work)
        self._wait(work.info)

    def _free(self, work: Work) -> None:
        for index in (work.node, *work.helpers):
            self._busy.discard(index)
            node = self.nodes[index]
            if node.up:
                for model in node.resident:
                    self._idle.setdefault(model, set()).add(index)

    def decide(self, now: float) -> Sequence[Action]:
        kept: list[tuple[float, int, _Stage]] = []
        blocked = set[str]()
        while self._waiting:
            entry = heapq.heappop(self._waiting)
            stage = entry[2]
            request = stage.request
            if request.left < 0:
                continue  # another stage of it was dropped already
            if now + request.left > request.job.deadline + 1e-9:
                request.left = -1.0
                self._out.append(Shed(request.job))
            elif any(model in blocked or not self._idle.get(model) for model in stage.models):
                # Who comes later in the order takes nothing that this one waits for.
                blocked.update(stage.models)
                kept.append(entry)
            else:
                self._start(stage)
        self._waiting = kept
        out, self._out = self._out, []
        return out

    def _start(self, stage: _Stage) -> None:
        nodes = [min(self._idle[model]) for model in stage.models]
        for model, node in zip(stage.models, nodes, strict=True):
            self._idle[model].discard(node)
            self._busy.add(node)
        job, sizes = stage.request.job, stage.request.job.pipeline.sizes
        pulled = {"encode": 0.0, "step": sizes.embeddings, "decode": sizes.latents}[stage.kind]
        at = stage.request.at
        same = at >= 0 and self.nodes[at].host == self.nodes[nodes[0]].host
        setup = self._dispatch + self.costs.transfer(pulled, same)
        work = Work(nodes[0], (job,), stage.calls, setup=setup, helpers=tuple(nodes[1:]))
        work.info = stage
        self._out.append(Start(work))

    def wake_at(self, now: float) -> float | None:
        late = (entry[2].request.job.deadline - entry[2].request.left for entry in self._waiting)
        return min((moment + 1e-6 for moment in late if moment >= now), default=None)
