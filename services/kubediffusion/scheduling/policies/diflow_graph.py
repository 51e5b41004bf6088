# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""A request unrolled as DiFlow does it: a task for every forward, of every step and branch.

Source: arXiv 2604.08123 and its artifact. A ControlNet's residuals are *deferred* inputs: the
denoiser is ready without them, and waits for them only where they are added.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kubediffusion.scheduling.pipelines import Pipeline, default_mode


@dataclass(slots=True)
class Op:
    """One task of the unrolled graph. `inputs` are (producer, bytes), deferred ones in `lazy`."""

    index: int
    model: str
    mode: str
    inputs: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    lazy: list[int] = field(default_factory=list[int])
    successors: list[int] = field(default_factory=list[int])
    depth: int = 1
    pinned: bool = False


def unroll(pipeline: Pipeline) -> list[Op]:
    """The tasks in an order in which producers come first; `depth` is the distance to the sink,
    which has 1."""
    graph = _Graph()
    sizes, prompts = pipeline.sizes, range(pipeline.prompts)
    embeddings = [[graph.add(model) for model in pipeline.encoders] for _ in prompts]
    latents = graph.add(pipeline.latents) if pipeline.latents else None
    sampler = graph.add(pipeline.sampler, pinned=True)
    if latents is not None:
        graph.feed(latents, sampler, sizes.latents)
    share = sizes.embeddings / max(1, len(pipeline.encoders))
    for _ in range(pipeline.steps):
        noises: list[int] = []
        for branch in range(pipeline.branches):
            encoded = embeddings[min(branch, pipeline.prompts - 1)]
            controls = [graph.add(control) for control in pipeline.controls]
            noise = graph.add(pipeline.denoiser)
            for task in (*controls, noise):
                graph.feed(sampler, task, sizes.latents)
                for each in encoded:
                    graph.feed(each, task, share)
            for control in controls:
                graph.defer(control, noise)
            noises.append(noise)
        following = graph.add(pipeline.sampler, pinned=True)
        graph.feed(sampler, following, 0.0)
        for noise in noises:
            graph.feed(noise, following, sizes.latents)
        sampler = following
    decoded = graph.add(pipeline.decoder, mode=default_mode(pipeline, pipeline.decoder))
    graph.feed(sampler, decoded, sizes.latents)
    graph.measure_depth()
    return graph.ops


class _Graph:
    def __init__(self) -> None:
        self.ops: list[Op] = []

    def add(self, model: str, mode: str = "default", *, pinned: bool = False) -> int:
        op = Op(len(self.ops), model, mode, pinned=pinned)
        self.ops.append(op)
        return op.index

    def feed(self, producer: int, consumer: int, nbytes: float) -> None:
        self.ops[consumer].inputs.append((producer, nbytes))
        self.ops[producer].successors.append(consumer)

    def defer(self, producer: int, consumer: int) -> None:
        self.ops[consumer].lazy.append(producer)
        self.ops[producer].successors.append(consumer)

    def measure_depth(self) -> None:
        """Breadth first from the sink over all edges: the fewest edges count."""
        producers = {op.index: [each for each, _ in op.inputs] + op.lazy for op in self.ops}
        seen = {self.ops[-1].index}
        front = [self.ops[-1].index]
        depth = 1
        while front:
            for index in front:
                self.ops[index].depth = depth
            front = [
                each
                for index in front
                for each in dict.fromkeys(producers[index])
                if each not in seen and not seen.add(each)
            ]
            depth += 1
